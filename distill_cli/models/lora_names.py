"""Choose the layers of a student that get adapters, by the names and shapes of its weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distill_cli.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]


def linear_layers(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return {name: (out, in)} of the matrices in the decoder's layers; `shapes` are those of all tensors."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in shapes.items()
        if re.search(r"\blayers\.\d+\.", name) and name.endswith(".weight") and len(shape) == 2
    }


def targeted(shapes: Shapes, targets: Sequence[str] | None) -> dict[str, tuple[int, int]]:
    """Return those of `linear_layers` whose names end with one of `targets`; all of them if that is None.

    Raises:
        ConfigError: no name ends with a target.
    """
    layers = linear_layers(shapes)
    if not layers:
        raise ConfigError("model.student.lora.rank: the student has no matrices called layers.<n>...; set it to null")
    if targets is None:
        return layers
    unknown = [target for target in targets if not any(_matches(name, target) for name in layers)]
    if unknown:
        there_are = ", ".join(dict.fromkeys(re.split(r"\blayers\.\d+\.", name)[1] for name in layers))
        raise ConfigError(
            f"model.student.lora.targets={','.join(unknown)}: matches no linear layer of the student; there are "
            f"{there_are} (embedding and head can have no adapter)"
        )
    return {name: shape for name, shape in layers.items() if any(_matches(name, target) for target in targets)}


def shortened(shapes: Shapes, names: Sequence[str]) -> list[str]:
    """Return targets that match exactly the layers `names`: the last parts of their names if that is enough."""
    last_parts = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    return last_parts if targeted(shapes, last_parts).keys() == set(names) else list(names)


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)
