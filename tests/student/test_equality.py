"""How the work is cut up changes neither loss, nor gradient norm, nor parameters."""

from collections.abc import Collection, Mapping

import pytest
import torch

from distill_cli.student.adapters import is_adapter

from .layouts import TABLE, Layout, Outcome, limit_of, reference_of, train

MORE = {
    "compiled, shard=2": Layout(ranks=2, compile=True),
    "compiled, selective checkpointing, context=2": Layout(
        ranks=2, context=2, compile=True, activation_checkpointing="selective"
    ),
    "LoRA, compiled, full checkpointing, shard=2": Layout(
        ranks=2, lora=4, compile=True, activation_checkpointing="full"
    ),
}
CORE = (
    *("shard=2", "tensor=2, sequence parallel", "context=2", "packing off", "accumulation, shard=2"),
    *("selective checkpointing, tensor=2", "cpu offload, shard=2", "untied, tensor=2"),
    "LoRA, tensor=2, sequence parallel",
)
"""One layout of each kind; the others are exhaustive."""
BF16 = {
    "shard=2": Layout(ranks=2, precision="bf16"),
    "tensor=2": Layout(ranks=2, tensor=2, precision="bf16"),
    "LoRA, tensor=2": Layout(ranks=2, tensor=2, lora=4, precision="bf16"),
}


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[Layout, Outcome]:
    """What the layouts of the collected tests come to, and their references."""
    tests = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    layouts = [item.callspec.params["layout"] for item in tests]
    return train([*layouts, *map(reference_of, layouts)])


def kinds(layouts: Mapping[str, Layout], core: Collection[str]) -> list:
    """Return the parameters of a test: the layouts by name, exhaustive but for the core."""
    marks = {name: () if name in core else pytest.mark.exhaustive for name in layouts}
    return [pytest.param(layout, id=name, marks=marks[name]) for name, layout in layouts.items()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", kinds(TABLE | MORE, CORE))
def test_the_same_as_one_plain_rank(layout: Layout, outcomes: dict[Layout, Outcome]) -> None:
    difference = outcomes[layout].difference(outcomes[reference_of(layout)])
    assert max(difference.values()) < limit_of(layout), difference


@pytest.mark.slow
@pytest.mark.parametrize("layout", kinds(BF16, ["tensor=2"]))
def test_bf16_is_close_and_trains_float32(layout: Layout, outcomes: dict[Layout, Outcome]) -> None:
    outcome, reference = outcomes[layout], outcomes[reference_of(layout)]
    torch.testing.assert_close(torch.tensor(outcome.losses), torch.tensor(reference.losses), rtol=0.02, atol=0)
    torch.testing.assert_close(torch.tensor(outcome.grad_norms), torch.tensor(reference.grad_norms), rtol=0.1, atol=0)
    for name, param in outcome.params.items():
        is_frozen = layout.lora and not is_adapter(name)
        assert param.dtype == (torch.bfloat16 if is_frozen else torch.float32)


def test_difference_shows_a_wrong_parameter() -> None:
    plain = Outcome([1.0], [1.0], {"w": torch.ones(4)})
    assert plain.difference(Outcome([1.0], [1.0], {"w": torch.ones(4) * 1.001}))["params"] > 1e-5
