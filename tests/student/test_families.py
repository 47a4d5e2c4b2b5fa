"""Students of families with traits of their own: five updates equal those of plain transformers on documents alone.

`scripts/check_families.py` runs all families, and `distill check` on each.
"""

import pytest

from tests.families import FAMILIES
from tests.student.forked import run_cases

pytestmark = pytest.mark.slow

LIMIT, BF16_LIMIT = 1e-5, 0.02
CASES = {
    "soft caps, window": {"family": "gemma2"},
    "soft caps, tensor=2": {"family": "gemma2", "ranks": 2, "tensor": 2},
    "sinks, experts with biases": {"family": "gpt_oss"},
    "sinks, rows": {"family": "gpt_oss", "rows": True, "checkpointing": "full"},
    "sinks, expert=2": {"family": "gpt_oss", "ranks": 2, "expert": 2, "checkpointing": "selective"},
    "shared keys, inputs per layer": {"family": "gemma4_shared"},
    "chunks, a causal LM in a wrapper": {"family": "llama4", "config": {"attention_chunk_size": 16, "floor_scale": 8}},
    "padding that the model knows, context=2": {"family": "gemma3n_text", "ranks": 2, "context": 2},
    "attention of its own": {"family": "bloom", "ranks": 2},
    "heads of two sizes": {"family": "deepseek_v2", "ranks": 2, "context": 2},
    "head with bias, parallel attention": {"family": "phi"},
    "scaled logits, packed experts": {"family": "granitemoe"},
    "linear attention, experts, shard=2": {"family": "qwen3_next", "ranks": 2},
    "Mamba-2": {"family": "falcon_h1"},
    "Mamba, bfloat16": {"family": "mamba", "bf16": True},
    "sinks, bfloat16": {"family": "gpt_oss", "bf16": True},
    "convolutions": {"family": "lfm2"},
    "latent attention, experts, expert=2": {"family": "deepseek_v3", "ranks": 4, "expert": 2},
    "a text model among towers": {"family": "gemma3"},
}


CORE = ("soft caps, window", "sinks, expert=2", "linear attention, experts, shard=2", "sinks, bfloat16")
"""The others are exhaustive."""


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, dict]:
    """What the cases of the collected tests come to."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["name"] for item in tests]
    return dict(
        zip(names, run_cases("tests.student.family_rank", [{"ranks": 1} | CASES[n] for n in names]), strict=True)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in CORE else pytest.mark.exhaustive) for name in CASES]
)
def test_equal_to_plain_transformers(name: str, outcomes: dict[str, dict]) -> None:
    found = dict(outcomes[name])
    worst = found.pop("worst")
    if CASES[name].get("bf16"):  # gradients are too coarse to be compared
        assert found["loss"] < BF16_LIMIT
    else:
        assert max(found.values()) < LIMIT, f"{found}, {worst}"


@pytest.mark.exhaustive
def test_what_cannot_be_cut_is_said() -> None:
    cases = [{"family": "lfm2", "tensor": 2}, {"family": "qwen3", "expert": 2}]
    refused = run_cases("tests.student.family_rank", [{"ranks": 2} | case for case in cases])
    assert "mesh.tensor" in refused[0]["refused"]
    assert "no experts" in refused[1]["refused"]


def test_every_family_is_a_causal_model() -> None:
    assert len(FAMILIES) >= 60
