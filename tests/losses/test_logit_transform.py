"""Bias, scale and soft cap of the fused head, against plain autograd over all logits in float64."""

from typing import Any

import pytest
import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import IDENTITY, LogitTransform

from .reference import Case, HeadLoss, reference_loss, topk_of

TOKENS, HIDDEN, VOCAB, TOPK = 9, 6, 30, 7
ENDS = (4, 28, 29)
"""Merged tokens. All but the first are at the vocabulary's end, and so other ids stay what they are without them."""
HEADS = {
    "scale": (LogitTransform(scale=0.4), False),
    "cap": (LogitTransform(soft_cap=5.0), False),
    "bias": (IDENTITY, True),
    "all": (LogitTransform(scale=1.6, soft_cap=5.0), True),
}
"""A transform, and whether there is a bias."""

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Hidden states, weight, bias."""


def make_inputs(dtype: torch.dtype = torch.float64) -> tuple[Inputs, Case]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(size, generator=generator) for size in ((TOKENS, HIDDEN), (VOCAB, HIDDEN), (VOCAB,))
    )
    teacher_NV = torch.randn(TOKENS, VOCAB - len(ENDS) + 1, generator=generator).double() * 2
    logp_NK, ids_NK = teacher_NV.log_softmax(-1).topk(TOPK)
    return tuple(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), Case(teacher_NV, logp_NK, ids_NK)


def run_head(inputs: Inputs, case: Case, loss: DistillLoss, *, with_bias: bool, **options: Any) -> HeadOutput:
    hidden, weight, bias = inputs
    logp_NK = case.teacher_logp_NK.to(torch.promote_types(weight.dtype, torch.float32))
    transform = options.pop("transform", IDENTITY)
    return linear_divergence(
        hidden,
        Head(weight, bias if with_bias else None, transform),
        topk_of(case.ids_NK, logp_NK),
        HeadLoss(loss),
        sampled_ids_N=torch.arange(len(hidden)),
        with_classes=True,
        chunk_tokens=4,
        **options,
    )


def dense_logits(inputs: Inputs, transform: LogitTransform, *, with_bias: bool) -> torch.Tensor:
    hidden, weight, bias = inputs
    logits_NV = transform.scale * (hidden @ weight.t() + (bias if with_bias else 0))
    return logits_NV if transform.soft_cap is None else transform.soft_cap * (logits_NV / transform.soft_cap).tanh()


def merge(scaled_NV: torch.Tensor, ends: tuple[int, ...]) -> torch.Tensor:
    """Return logits at the temperature without the last two tokens, whose probability the first end has too."""
    if not ends:
        return scaled_NV
    class_N1 = scaled_NV[:, list(ends)].logsumexp(-1, keepdim=True)
    return torch.cat([scaled_NV[:, : ends[0]], class_N1, scaled_NV[:, ends[0] + 1 : ends[1]]], dim=-1)


def gradients_of(loss: torch.Tensor, inputs: Inputs, *, with_bias: bool) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, inputs if with_bias else inputs[:2])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("ends", [(), ENDS])
@pytest.mark.parametrize("tail", ["bucket", "zero"])  # the latter's loss reads the entropy
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_outputs_and_gradients_equal_dense(
    head: str, temperature: float, ends: tuple[int, ...], tail: str, dtype: torch.dtype, tolerance: float
) -> None:
    transform, with_bias = HEADS[head]
    inputs, case = make_inputs(dtype)
    output = run_head(
        inputs,
        case,
        DistillLoss(kl_type="mixed", tail=tail),
        with_bias=with_bias,
        temperature=temperature,
        merged_eos_ids=ends,
        transform=transform,
        num_top=3,
    )
    exact, _ = make_inputs()
    logits_NV = dense_logits(exact, transform, with_bias=with_bias)
    scaled_NV = merge(logits_NV / temperature, ends)
    loss_N = reference_loss(case, scaled_NV, kl_type="mixed", tail=tail)
    logp_NV = scaled_NV.log_softmax(-1)
    top_logp_NM, top_ids_NM = logp_NV.topk(3)
    pairs = [
        (output.loss_N, loss_N),
        (output.student_logp_NC[:, :-1], logp_NV.gather(1, case.ids_NK)),
        (output.entropy_N, -(logp_NV.exp() * logp_NV).sum(-1)),
        (output.sampled_logp_N, logits_NV.log_softmax(-1).diagonal()),
        (output.top_logp_NM, top_logp_NM),
        *zip(
            gradients_of(output.loss, inputs, with_bias=with_bias),
            gradients_of(loss_N.sum(), exact, with_bias=with_bias),
            strict=True,
        ),
    ]
    errors = [float((got.detach() - right.detach()).norm() / right.detach().norm()) for got, right in pairs]
    assert errors == pytest.approx([0.0] * len(errors), abs=tolerance)
    assert output.top_ids_NM.equal(top_ids_NM)
    assert output.argmax_N.equal(top_ids_NM[:, 0])


class Recomputed(torch.autograd.Function):
    """The head's loss whose backward may run often, as gradcheck's does."""

    @staticmethod
    def loss(inputs: Inputs, case: Case) -> torch.Tensor:
        options = {"temperature": 1.7, "merged_eos_ids": ENDS, "transform": HEADS["all"][0], "with_bias": True}
        return run_head(inputs, case, DistillLoss(kl_type="jsd", tail="zero"), **options).loss

    @staticmethod
    def forward(ctx: Any, case: Case, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.case = case
        ctx.save_for_backward(*inputs)
        return Recomputed.loss(inputs, case)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in ctx.saved_tensors)
        with torch.enable_grad():
            loss = Recomputed.loss(inputs, ctx.case)
        return None, *torch.autograd.grad(loss, inputs, grad)


def test_gradients_equal_finite_differences() -> None:
    inputs, case = make_inputs()
    assert torch.autograd.gradcheck(lambda *inputs: Recomputed.apply(case, *inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_cap_bounds_large_logits(tail: str, dtype: torch.dtype) -> None:
    """The weight is the identity, so that hidden states are the raw logits; the last row is not saturated."""
    raw = [[300.0, -300.0, 0.0, 20.0, 290.0], [-300.0, 300.0, 299.0, -5.0, 1.0], [3.0, 1.0, 25.0, 10.0, -40.0]]
    inputs = tuple(x.to(dtype).requires_grad_() for x in (torch.tensor(raw), torch.eye(5), torch.zeros(5)))
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    logp_NK, ids_NK = torch.tensor([[1.0, 2.0, 3.0, 0.0, -1.0]]).expand(3, 5).double().log_softmax(-1).topk(3)
    case = Case(exact[0], logp_NK, ids_NK)
    transform = LogitTransform(soft_cap=30.0)
    output = run_head(inputs, case, DistillLoss(kl_type="mixed", tail=tail), with_bias=True, transform=transform)
    loss_N = reference_loss(case, dense_logits(exact, transform, with_bias=True), kl_type="mixed", tail=tail)
    close = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(output.loss_N, loss_N.detach(), **close)
    pairs = zip(torch.autograd.grad(output.loss, inputs), torch.autograd.grad(loss_N.sum(), exact), strict=True)
    for got, right in pairs:
        torch.testing.assert_close(got, right, rtol=1e-6, atol=1e-6 * float(right.abs().max()), check_dtype=False)


@pytest.mark.parametrize("trained", [0, 1, 2, None])
def test_frozen_inputs_get_no_gradient(trained: int | None) -> None:
    inputs, case = make_inputs()
    loss = DistillLoss(kl_type="mixed", tail="zero")
    options = {"with_bias": True, "transform": HEADS["all"][0]}
    expected = gradients_of(run_head(inputs, case, loss, **options).loss, inputs, with_bias=True)
    some = tuple(x.detach().requires_grad_(place == trained) for place, x in enumerate(inputs))
    output = run_head(some, case, loss, **options)
    assert output.loss.requires_grad == (trained is not None)
    if trained is not None:
        output.loss.backward()
        assert some[trained].grad.equal(expected[trained])
    assert [x.grad is not None for x in some] == [place == trained for place in range(3)]


def test_no_tokens_give_zero_gradients() -> None:
    (hidden, weight, bias), case = make_inputs()
    empty = Case(case.logits_NV[:0], case.teacher_logp_NK[:0], case.ids_NK[:0])
    inputs = hidden[:0].detach().requires_grad_(), weight, bias
    output = run_head(inputs, empty, DistillLoss(kl_type="mixed"), with_bias=True, transform=HEADS["all"][0])
    output.loss.backward()
    assert output.loss.item() == 0
    assert [tuple(x.grad.shape) for x in inputs] == [(0, HIDDEN), (VOCAB, HIDDEN), (VOCAB,)]
    assert bool((bias.grad == 0).all())


def test_bfloat16_bias_is_added_in_float32() -> None:
    low, case = make_inputs(torch.bfloat16)
    high = tuple(x.detach().float().requires_grad_() for x in low)
    options = {"with_bias": True, "transform": HEADS["all"][0]}
    outputs = [run_head(inputs, case, DistillLoss(kl_type="mixed"), **options) for inputs in (low, high)]
    assert outputs[0].loss_N.equal(outputs[1].loss_N)
    gradients = [gradients_of(x.loss, inputs, with_bias=True) for x, inputs in zip(outputs, (low, high), strict=True)]
    for one, other in zip(*gradients, strict=True):
        assert one.equal(other.bfloat16())


def test_zero_bias_changes_no_bit() -> None:
    (hidden, weight, bias), case = make_inputs(torch.float32)
    inputs = hidden, weight, torch.zeros_like(bias).requires_grad_()
    losses = [
        run_head(inputs, case, DistillLoss(kl_type="mixed"), with_bias=with_bias).loss for with_bias in (False, True)
    ]
    assert losses[0].equal(losses[1])
    for one, other in zip(*(gradients_of(loss, inputs, with_bias=False) for loss in losses), strict=True):
        assert one.equal(other)
