"""Count a text model's parameters, and those that compute a token. No torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill_cli.models import model_files
from distill_cli.models.lora_names import targeted
from distill_cli.models.tensor_names import is_expert
from distill_cli.models.traits import Experts, Traits


def count(folder: Path) -> int:
    """Return the parameters of the text model in a folder."""
    return sum(map(math.prod, model_files.text_shapes(folder).values()))


def count_active(folder: Path) -> int:
    """Return those of them that compute a token: of each layer's experts only as many as the router chooses."""
    experts, shapes = Traits.read(folder).experts, model_files.text_shapes(folder)
    routed = sum(map(math.prod, expert_shapes(shapes, experts).values()))
    share = experts.per_token / experts.number if experts else 1.0
    return count(folder) - routed + round(routed * share)


def count_adapters(folder: Path, *, rank: int, targets: Sequence[str] | None) -> int:
    """Return the parameters of adapters of a rank. Raises ConfigError if no layer matches a target."""
    return sum(rank * sum(sides) for sides in targeted(model_files.shapes(folder), targets).values())


def expert_shapes(shapes: Mapping[str, tuple[int, ...]], experts: Experts | None) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model's experts, whether they are stored one by one or stacked."""
    if experts is None:
        return {}
    return {
        name: shape
        for name, shape in shapes.items()
        if is_expert(name) or (len(shape) == 3 and shape[0] == experts.number and shape[1] > 1)
    }
