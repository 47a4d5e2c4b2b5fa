"""Choose the layers of a student that get adapters, by the names and shapes of its weights. No torch."""

import re
from collections.abc import Container, Iterable, Mapping, Sequence

from distill_cli.errors import ConfigError
from distill_cli.models.tensor_names import is_expert, is_router, text_tensors

Shapes = Mapping[str, tuple[int, ...]]
READ_BY_KERNELS = ("out_proj", "x_proj", "dt_proj")
"""Matrices of Mamba mixers."""


def targeted(shapes: Shapes, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Return {name: (out, in)} of the matrices in the decoder's layers that match `targets`; of all if that is None.

    Left out are the parts of other inputs (vision towers), what is no linear layer in the model (the experts, which it
    stacks, routers, norms), and the matrices of Mamba mixers that kernels read past an adapter.

    Args:
        shapes: those of all the student's tensors.
        targets: the last parts of names.

    Raises:
        ConfigError: there are no such matrices, or none matches a target.
    """
    tensors = text_tensors(shapes)
    layers = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in tensors.items()
        if re.search(r"\blayers\.\d+\..*\.weight$", name) and len(shape) == 2 and not _is_left_out(name, tensors)
    }
    if not layers:
        raise ConfigError("model.student.lora.rank: the student has no matrices called layers.<n>...; set it to null")
    if targets is None:
        return layers
    matching = {target: [name for name in layers if _matches(name, target)] for target in targets}
    if unknown := ",".join(target for target, names in matching.items() if not names):
        allowed = ", ".join(dict.fromkeys(re.split(r"\blayers\.\d+\.", name)[1] for name in layers))
        what = f"model.student.lora.targets={unknown}: {_why_not(tensors, unknown.split(','))}"
        raise ConfigError(f"{what}; choose from {allowed} (embedding and head can have no adapter)")
    chosen = {name for names in matching.values() for name in names}
    return {name: shape for name, shape in layers.items() if name in chosen}


def _is_left_out(name: str, tensors: Container[str]) -> bool:
    return is_expert(name) or is_router(name) or "norm" in name.split(".")[-2] or _is_read_by_kernel(name, tensors)


def _is_read_by_kernel(name: str, tensors: Container[str]) -> bool:
    """Whether a Mamba mixer's kernels read the matrix past an adapter; peft refuses the last one."""
    layer, _, matrix = name.removesuffix(".weight").rpartition(".")
    return matrix in READ_BY_KERNELS and f"{layer}.D" in tensors


def _matches(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _why_not(tensors: Iterable[str], targets: Sequence[str]) -> str:
    for what, belongs in (("experts, which are stacked in one tensor", is_expert), ("routers", is_router)):
        own = [name.removesuffix(".weight") for name in tensors if belongs(name)]
        if any(_matches(name, target) or belongs(f".{target}.") for name in own for target in targets):
            return f"matches {what}, and adapters are for linear layers alone"
    return "matches no linear layer of the student"


def shortened(shapes: Shapes, names: Sequence[str]) -> list[str]:
    """Return targets that match exactly the layers `names`: the last parts of their names if that is enough."""
    last_parts = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return last_parts if targeted(shapes, last_parts).keys() == set(names) else list(names)
