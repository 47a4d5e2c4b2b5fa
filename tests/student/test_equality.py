"""How the work is cut up changes neither loss, nor gradient norm, nor parameters."""

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
BF16 = [Layout(ranks=2, precision="bf16"), Layout(ranks=2, tensor=2, precision="bf16")]
BF16 += [Layout(ranks=2, tensor=2, lora=4, precision="bf16")]


@pytest.fixture(scope="module")
def outcomes() -> dict[Layout, Outcome]:
    layouts = [*TABLE.values(), *MORE.values(), *BF16]
    return train([*layouts, *map(reference_of, layouts)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TABLE, *MORE])
def test_the_same_as_one_plain_rank(name: str, outcomes: dict[Layout, Outcome]) -> None:
    layout = (TABLE | MORE)[name]
    difference = outcomes[layout].difference(outcomes[reference_of(layout)])
    assert max(difference.values()) < limit_of(layout), difference


@pytest.mark.slow
@pytest.mark.parametrize("layout", BF16, ids=["shard=2", "tensor=2", "LoRA, tensor=2"])
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
