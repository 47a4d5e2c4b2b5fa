"""Choose the layers of a student that get adapters, by the names and shapes of its weights. No torch."""

import re
from collections.abc import Mapping, Sequence

from distill_cli.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def targeted(shapes: Shapes, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Return {name: (out, in)} of the matrices in the decoder's layers that match `targets`; of all if that is None.

    Args:
        shapes: those of all the student's tensors.
        targets: the last parts of names.

    Raises:
        ConfigError: there are no such matrices, or none matches a target.
    """
    layers = {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if re.search(r"\blayers\.\d+\..*\.weight$", name) and len(shape) == 2
    }
    if not layers:
        raise ConfigError("model.student.lora.rank: the student has no matrices called layers.<n>...; set it to null")
    if targets is None:
        return layers
    matching = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    if unknown := ",".join(target for target, names in matching.items() if not names):
        allowed = ", ".join(dict.fromkeys(re.split(r"\blayers\.\d+\.", name)[1] for name in layers))
        what = f"model.student.lora.targets={unknown}: matches no linear layer of the student"
        raise ConfigError(f"{what}; choose from {allowed} (embedding and head can have no adapter)")
    chosen = {name for names in matching.values() for name in names}
    return {name: shape for name, shape in layers.items() if name in chosen}


def shortened(shapes: Shapes, names: Sequence[str]) -> list[str]:
    """Return targets that match exactly the layers `names`: the last parts of their names if that is enough."""
    last_parts = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return last_parts if targeted(shapes, last_parts).keys() == set(names) else list(names)
