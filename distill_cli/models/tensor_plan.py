"""Which linear layers of a family tensor-parallel ranks share, and into how many parts they divide. No torch.

To add a family whose config declares no plan, or one with other styles, put it into PLANS by its `model_type`.
"""

import ast
import math
from collections.abc import Mapping
from typing import Any

from distill_cli.errors import ConfigError
from distill_cli.models import known_families
from distill_cli.models.traits import Traits

PLANS: dict[str, dict[str, str]] = {}
"""model_type -> {name pattern of a linear layer under the base model: colwise | rowwise}, for families whose own config
declares no usable plan."""
TESTED = ("gemma3_text", "llama", "mistral", "qwen2", "qwen3")
STYLES = ("colwise", "rowwise")
OTHER_STYLES = ("replicated_with_grad_allreduce", "embedding_rowwise")
"""Styles of norms and the embedding: `parallel/tensor.py` chooses their layout itself."""
CUT = {
    "attention heads": ("num_attention_heads", "num_attention_heads"),
    "key-value heads": ("num_key_value_heads", "num_attention_heads"),
    "the MLP's size": ("intermediate_size", "intermediate_size"),
    "the vocabulary": ("vocab_size", "vocab_size"),
}
"""The dims that are cut, with the field that says their size, and the one that says it without that."""


def matrix_plan(config: Mapping[str, Any], declared: Mapping[str, str] | None) -> dict[str, str]:
    """Return {name pattern: colwise | rowwise} of the linear layers under the base model.

    Args:
        config: the text model's.
        declared: `base_model_tp_plan` of the family's config class.

    Raises:
        ConfigError: the family has no usable plan.
    """
    family = str(config.get("model_type"))
    if uncut := Traits.of(config).uncut:
        raise ConfigError(f"mesh.tensor: {family} has {', '.join(uncut)}, which are not cut; set it to 1")
    plan = PLANS.get(family) or declared or {}
    matrices = {name: style for name, style in plan.items() if style in STYLES}
    others = {*plan.values()} - {*STYLES, *OTHER_STYLES}
    if not matrices or others:
        why = f"its plan has the styles {', '.join(sorted(others))}" if others else "it declares no plan"
        raise ConfigError(
            f"mesh.tensor: the family {family} cannot be cut ({why}); take one of {', '.join(TESTED)} or a dense one "
            "whose transformers config has a base_model_tp_plan of colwise and rowwise layers, add its linear layers "
            "to PLANS in distill_cli/models/tensor_plan.py, or set mesh.tensor=1"
        )
    return matrices


def check_sizes(config: Mapping[str, Any], size: int) -> None:
    """Raise ConfigError, with the sizes that are possible, if `size` does not divide the dims that are cut.

    Args:
        config: the text model's; a field that it leaves out is not checked.
    """
    cut = {name: config.get(field) or config.get(other) for name, (field, other) in CUT.items()}
    numbers = {name: number for name, number in cut.items() if number is not None}
    if lists := [name for name, number in numbers.items() if not isinstance(number, int)]:
        raise ConfigError(f"mesh.tensor={size}: the student's layers differ in {', '.join(lists)}; set it to 1")
    if any(number % size for number in numbers.values()):
        common = math.gcd(*numbers.values())
        fits = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        sizes = ", ".join(f"{name} ({number})" for name, number in numbers.items() if number % size)
        raise ConfigError(f"mesh.tensor={size}: does not divide {sizes} of the student; choose one of {fits}")


def declared_plan(family: str) -> dict[str, str] | None:
    """Return the plan in the source of a family's config class; None if it is not written out there."""
    for node in ast.walk(ast.parse(known_families.source_of(family, "configuration"))):
        if not isinstance(node, ast.ClassDef):
            continue
        values = {
            target.id: statement.value
            for statement in node.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        model_type, plan = values.get("model_type"), values.get("base_model_tp_plan")
        if isinstance(model_type, ast.Constant) and model_type.value == family and isinstance(plan, ast.Dict):
            return dict(ast.literal_eval(plan))
    return None
