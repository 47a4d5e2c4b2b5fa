"""The fused head against plain autograd over all logits in float64, and what it must never do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from distill_cli.losses.distill_loss import PADDING_LOGP, TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import LogitTransform

from .reference import Case, HeadLoss, reference_loss, topk_of

TOKENS, HIDDEN, VOCAB, TOPK = 23, 16, 101, 7
COMBINATIONS = [(kl_type, tail) for kl_type in DIVERGENCES for tail in TAILS]


def make_head(*, seed: int = 0, tokens: int = TOKENS, topk: int = TOPK) -> tuple[torch.Tensor, torch.Tensor, Case]:
    """Hidden states, weight, and a teacher; the case's own logits are the plain ones."""
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(tokens, HIDDEN, generator=generator)
    weight_VH = torch.randn(VOCAB, HIDDEN, generator=generator)
    logits_NV = hidden_NH.double() @ weight_VH.double().t()
    teacher_NV = logits_NV + torch.randn(tokens, VOCAB, generator=generator)
    logp_NK, ids_NK = teacher_NV.log_softmax(-1).topk(topk)
    return hidden_NH, weight_VH, Case(logits_NV, logp_NK.float(), ids_NK)


def run_head(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, case: Case, loss: DistillLoss, **options: object
) -> HeadOutput:
    """Tokens weigh differently, so that a wrong row shows."""
    weights_N = torch.linspace(0.5, 1.5, hidden_NH.shape[0], dtype=case.teacher_logp_NK.dtype)
    head = {name: options.pop(name) for name in ("bias_V", "transform") if name in options}
    return linear_divergence(
        hidden_NH,
        Head(weight_VH, **head),
        topk_of(case.ids_NK, case.teacher_logp_NK),
        HeadLoss(loss, weights_N),
        sampled_ids_N=torch.arange(hidden_NH.shape[0]) % weight_VH.shape[0],
        with_classes=True,
        **options,
    )


def dense_gradients(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, case: Case, *, temperature: float = 1.0, **options: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients by autograd over all logits, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden_NH, weight_VH))
    weights_N = torch.linspace(0.5, 1.5, hidden_NH.shape[0], dtype=torch.float64)
    loss = (weights_N * reference_loss(case, hidden @ weight.t() / temperature, **options)).sum()
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def gradients_of(output: HeadOutput, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(output.loss, inputs)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients_equal_plain_autograd(kl_type: str, tail: str, temperature: float) -> None:
    hidden, weight, case = make_head()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    output = run_head(
        hidden, weight, case, DistillLoss(kl_type=kl_type, tail=tail), temperature=temperature, chunk_tokens=5
    )
    got = (output.loss, *gradients_of(output, hidden, weight))
    expected = dense_gradients(hidden, weight, case, temperature=temperature, kl_type=kl_type, tail=tail)
    assert [relative_error(a, b) for a, b in zip(got, expected, strict=True)] == pytest.approx([0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_of_each_token(temperature: float) -> None:
    hidden, weight, case = make_head()
    loss = DistillLoss(kl_type="forward")
    output = run_head(hidden, weight, case, loss, temperature=temperature, chunk_tokens=5)
    logp_NV = (case.logits_NV / temperature).log_softmax(-1)
    sampled_N1 = (torch.arange(TOKENS) % VOCAB)[:, None]
    close = {"rtol": 1e-5, "atol": 2e-6, "check_dtype": False}
    torch.testing.assert_close(output.student_logp_NC[:, :-1], logp_NV.gather(1, case.ids_NK), **close)
    rest_N = 1 - logp_NV.gather(1, case.ids_NK).exp().sum(-1)
    torch.testing.assert_close(output.student_logp_NC[:, -1], rest_N.log(), **close)
    torch.testing.assert_close(output.entropy_N, -(logp_NV.exp() * logp_NV).sum(-1), **close)
    torch.testing.assert_close(output.argmax_N, logp_NV.argmax(-1))
    at_one_N = case.logits_NV.log_softmax(-1).gather(1, sampled_N1)[:, 0]
    torch.testing.assert_close(output.sampled_logp_N, at_one_N, **close)
    torch.testing.assert_close(output.loss, output.loss_N.sum())
    assert output.loss_N.shape == (TOKENS,)
    assert not any(x.requires_grad for x in (output.loss_N, output.student_logp_NC, output.entropy_N))


@pytest.mark.parametrize("chunk_tokens", [1, 7, TOKENS, 1000, None])
def test_chunks_change_nothing(chunk_tokens: int | None) -> None:
    hidden, weight, case = make_head()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = DistillLoss(kl_type="mixed", tail="zero")
    outputs = [run_head(hidden, weight, case, loss, chunk_tokens=size) for size in (5, chunk_tokens)]
    for name in ("loss", "loss_N", "student_logp_NC", "entropy_N", "argmax_N", "sampled_logp_N"):
        torch.testing.assert_close(*(getattr(output, name) for output in outputs), rtol=1e-12, atol=1e-12)
    for one, other in zip(*(gradients_of(output, hidden, weight) for output in outputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_loss_of_the_entropy_alone() -> None:
    hidden, weight, case = make_head()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = HeadLoss(DistillLoss(kl_type="mixed"))
    loss.loss = lambda _teacher, logp, entropy: entropy + 0 * logp.sum(-1)
    teacher, sampled = topk_of(case.ids_NK, case.teacher_logp_NK), case.ids_NK[:, 0]
    output = linear_divergence(hidden, Head(weight), teacher, loss, sampled_ids_N=sampled, temperature=1.3)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp_NV = (exact[0] @ exact[1].t() / 1.3).log_softmax(-1)
    expected = torch.autograd.grad(-(logp_NV.exp() * logp_NV).sum(), exact)
    for got, right in zip(gradients_of(output, hidden, weight), expected, strict=True):
        assert relative_error(got, right) < 1e-5


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_required_inputs_get_a_gradient(frozen: str) -> None:
    hidden, weight, case = make_head()
    free = weight if frozen == "hidden" else hidden
    free.requires_grad_()
    loss = DistillLoss(kl_type="mixed")
    run_head(hidden, weight, case, loss).loss.backward()
    expected = dense_gradients(hidden, weight, case, kl_type="mixed", tail="bucket")
    assert relative_error(free.grad, expected[2 if frozen == "hidden" else 1]) < 1e-5


def test_without_gradients_values_are_the_same() -> None:
    hidden, weight, case = make_head()
    loss = DistillLoss(kl_type="mixed")
    plain = run_head(hidden, weight, case, loss)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with torch.no_grad():
        quiet = run_head(hidden, weight, case, loss)
    loud = run_head(hidden, weight, case, loss)
    assert loud.loss.requires_grad
    for output in (plain, quiet):
        assert not output.loss.requires_grad
        assert torch.equal(output.loss, loud.loss)
        assert torch.equal(output.loss_N, loud.loss_N)


def test_backward_scales_accumulates_runs_once() -> None:
    hidden, weight, case = make_head()
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = DistillLoss(kl_type="reverse")
    expected = gradients_of(run_head(hidden, weight, case, loss), hidden, weight)
    for factor in (2.0, -0.5):
        (factor * run_head(hidden, weight, case, loss).loss).backward()
    torch.testing.assert_close(hidden.grad, 1.5 * expected[0])
    torch.testing.assert_close(weight.grad, 1.5 * expected[1])
    output = run_head(hidden, weight, case, loss)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran twice"):
        output.loss.backward()


def test_bfloat16_is_multiplied_in_float32() -> None:
    hidden, weight, case = make_head()
    low = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    high = [x.detach().float().requires_grad_() for x in low]
    loss = DistillLoss(kl_type="mixed")
    outputs = [run_head(*inputs, case, loss) for inputs in (low, high)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].student_logp_NC, outputs[1].student_logp_NC)
    for one, other in zip(gradients_of(outputs[0], *low), gradients_of(outputs[1], *high), strict=True):
        assert torch.equal(one, other.bfloat16())


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
def test_padding_counts_for_nothing(kl_type: str, tail: str) -> None:
    """Rows of 7, of which some have only 4 ids; token 0 is among the first row's real ones."""
    hidden, weight, case = make_head()
    ids, logp = case.ids_NK.clone(), case.teacher_logp_NK.clone()
    if 0 not in ids[0]:
        ids[0, 1] = 0
    ids[::2, 4:], logp[::2, 4:] = -1, PADDING_LOGP
    case = Case(case.logits_NV, logp, ids)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    output = run_head(hidden, weight, case, DistillLoss(kl_type=kl_type, tail=tail), chunk_tokens=5)
    got = (output.loss, *gradients_of(output, hidden, weight))
    expected = dense_gradients(hidden, weight, case, kl_type=kl_type, tail=tail)
    assert [relative_error(a, b) for a, b in zip(got, expected, strict=True)] == pytest.approx([0, 0, 0], abs=1e-5)
    assert bool((output.student_logp_NC[::2, 4:-1] == PADDING_LOGP).all())


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize("topk", [1, VOCAB])
def test_smallest_and_largest_k(kl_type: str, tail: str, topk: int) -> None:
    hidden, weight, case = make_head(topk=topk)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    output = run_head(hidden, weight, case, DistillLoss(kl_type=kl_type, tail=tail))
    got = gradients_of(output, hidden, weight)
    # k = V: the full divergence whatever the tail; k = 1 renormalised: both sides are 1 on their only class.
    tail = "renormalize" if topk == VOCAB else tail
    loss, *expected = dense_gradients(hidden, weight, case, kl_type=kl_type, tail=tail)
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-5)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=float(1e-5 * other.norm() + 1e-6))


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(kl_type: str, tail: str, tokens: int) -> None:
    hidden, weight, case = make_head(tokens=tokens)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    output = run_head(hidden, weight, case, DistillLoss(kl_type=kl_type, tail=tail))
    output.loss.backward()
    assert output.student_logp_NC.shape == (tokens, TOPK + 1)
    assert hidden.grad.shape == (tokens, HIDDEN)
    assert bool((weight.grad == 0).all()) == (tokens == 0)
    if tokens == 0:
        assert output.loss.item() == 0


def test_rows_of_zero_weight_change_nothing() -> None:
    hidden, weight, case = make_head()
    ids, logp = case.ids_NK.clone(), case.teacher_logp_NK.clone()
    ids[3:9], logp[3:9] = 0, 0.0  # fillers: the same id over and over, and a mass of 7
    weights_N = torch.ones(TOKENS)
    weights_N[3:9] = 0
    loss = DistillLoss(kl_type="mixed")
    results = []
    for rows in (torch.arange(TOKENS), weights_N.nonzero()[:, 0]):
        inputs = hidden[rows].clone().requires_grad_(), weight.clone().requires_grad_()
        output = linear_divergence(
            inputs[0],
            Head(inputs[1]),
            topk_of(ids[rows], logp[rows]),
            HeadLoss(loss, weights_N[rows]),
            sampled_ids_N=ids[rows, 0],
        )
        results.append((output, *gradients_of(output, *inputs)))
    (filled, filled_hidden, filled_weight), (without, _, without_weight) = results
    torch.testing.assert_close(filled.loss, without.loss)
    torch.testing.assert_close(filled_weight, without_weight)
    assert bool((filled_hidden[3:9] == 0).all())


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize("kl_weight", [0.0, 0.5, 1.0])
def test_extreme_logits_stay_finite(kl_type: str, tail: str, kl_weight: float) -> None:
    """The weight is the identity, so that hidden states are the logits: +-1e4, where all but one underflow."""
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, -1e4, -1e4, 1e4], [0.0, 0.0, 0.0, -200.0]]).requires_grad_()
    weight = torch.eye(4, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 3.0, 0.0], [0.0, 1e4, -1e4, 1e4], [1e4, 0.0, 0.0, 0.0]]).log_softmax(-1)
    logp, ids = teacher.topk(2)
    case = Case(logits.detach().double(), logp, ids)
    output = run_head(logits, weight, case, DistillLoss(kl_type=kl_type, tail=tail, kl_weight=kl_weight, skew=0.0))
    assert all(bool(x.isfinite().all()) for x in (output.loss_N, *gradients_of(output, logits, weight)))
    assert bool((output.loss_N >= -1e-6).all())


@pytest.mark.parametrize("kl_type", [name for name in DIVERGENCES if name != "l1"])  # its gradients cancel
@pytest.mark.parametrize("q_rest", [1e-3, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("p_rest", [0.3, 1e-4])
def test_tiny_rest_is_precise(kl_type: str, p_rest: float, q_rest: float) -> None:
    """From float32 logits to value and logits' gradient, each to 1e-5 of its own size."""
    first = torch.tensor([0.6, 0.4]).mul(1 - q_rest).tolist()
    logits = torch.tensor([[*first, 0.75 * q_rest, 0.25 * q_rest]]).log().requires_grad_()
    case = Case(logits, torch.tensor([[0.5, 0.5]]).mul(1 - p_rest).log(), torch.tensor([[0, 1]]))
    output = run_head(logits, torch.eye(4), case, DistillLoss(kl_type=kl_type))
    (got,) = gradients_of(output, logits)
    loss, expected, _ = dense_gradients(logits, torch.eye(4), case, kl_type=kl_type, tail="bucket")
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    tokens=st.integers(1, 12),
    topk=st.integers(1, 20),
    chunk_tokens=st.integers(1, 13),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    kl_type=st.sampled_from(list(DIVERGENCES)),
    tail=st.sampled_from(TAILS),
)
def test_any_shape_matches(
    seed: int, tokens: int, topk: int, chunk_tokens: int, temperature: float, kl_type: str, tail: str
) -> None:
    hidden, weight, case = make_head(seed=seed, tokens=tokens, topk=topk)
    inputs = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = DistillLoss(kl_type=kl_type, tail=tail)
    case = Case(case.logits_NV, case.teacher_logp_NK.double(), case.ids_NK)
    output = run_head(*inputs, case, loss, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = dense_gradients(*inputs, case, temperature=temperature, kl_type=kl_type, tail=tail)
    for got, right in zip((output.loss, *gradients_of(output, *inputs)), expected, strict=True):
        torch.testing.assert_close(got.detach(), right, rtol=1e-8, atol=1e-10)


class Noted(TorchDispatchMode):
    """Notes every operation and the number of elements of each tensor that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        self.made += [(func._opname, value.numel()) for value in results if isinstance(value, torch.Tensor)]
        return result


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_no_tensor_of_tokens_by_vocabulary(tail: str, temperature: float) -> None:
    hidden, weight, case = make_head(tokens=200)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    loss = DistillLoss(kl_type="mixed", tail=tail)
    with Noted() as forward:
        output = run_head(hidden, weight, case, loss, temperature=temperature, chunk_tokens=8)
    with Noted() as backward:
        output.loss.backward()
    assert max(size for _, size in forward.made) == max(2 * 8 * VOCAB, 200 * HIDDEN, VOCAB * HIDDEN)
    # The weight's gradient is scaled in place and handed over: nothing of its size is made a second time.
    assert {name for name, size in backward.made if size > 1} == {"mul_", "detach"}


@pytest.mark.parametrize(
    ("transform", "trains", "num_buffers"),
    [(LogitTransform(2.0), True, 2), (LogitTransform(soft_cap=3.0), True, 3), (LogitTransform(soft_cap=3.0), False, 2)],
)
def test_only_trained_cap_takes_memory(transform: LogitTransform, trains: bool, num_buffers: int) -> None:
    hidden, weight, case = make_head(tokens=24)
    inputs = [x.requires_grad_(trains) for x in (hidden, weight)]
    with Noted() as noted:
        run_head(
            *inputs, case, DistillLoss(kl_type="mixed"), chunk_tokens=12, transform=transform, bias_V=torch.zeros(VOCAB)
        )
    assert max(size for _, size in noted.made) == num_buffers * 12 * VOCAB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, case = make_head()
    inputs = [x.to("cuda", dtype).requires_grad_() for x in (hidden, weight)]
    ids, logp = case.ids_NK.cuda(), case.teacher_logp_NK.cuda()
    loss = DistillLoss(kl_type="mixed", tail="zero")
    weights = torch.linspace(0.5, 1.5, TOKENS, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # the chunk loop never waits for the device
    try:
        teacher, sampled = topk_of(ids, logp), ids[:, 0]
        output = linear_divergence(
            inputs[0], Head(inputs[1]), teacher, HeadLoss(loss, weights), sampled_ids_N=sampled, chunk_tokens=5
        )
        output.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    rounded = [x.detach().cpu().float() for x in inputs]
    expected = dense_gradients(*rounded, case, kl_type="mixed", tail="zero")
    assert relative_error(output.loss.cpu(), expected[0]) < 1e-4  # the logits are float32 whatever the inputs are
    for got, right in zip(inputs, expected[1:], strict=True):
        assert relative_error(got.grad.cpu(), right) < tolerance
