"""Divergences and tails: by hand, against a dense float64 reference, by their properties, and at the edges."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_cli.errors import ConfigError
from distill_cli.losses.distill_loss import PADDING_LOGP, TAILS, DistillLoss
from distill_cli.losses.divergence import DIVERGENCES, SIGNATURES

from .reference import Case, make_case, reference_loss, student_classes

ln = math.log
COMBINATIONS = [(kl_type, tail) for kl_type in DIVERGENCES for tail in TAILS]
PARAMETERS = [(0.5, 0.1), (0.3, 0.6), (0.0, 0.0), (1.0, 0.5)]


def loss_of(case: Case, *, dtype: torch.dtype = torch.float32, **options: object) -> torch.Tensor:
    classes = student_classes(case.logits_NV, case.ids_NK, dtype)
    return DistillLoss(**options)(case.teacher_logp_NK, *classes)


@pytest.mark.parametrize(
    ("kl_type", "tail", "expected"),
    [
        # p = 1/2, 1/4, rest 1/4; q = 1/4, 1/4, rest 1/2 (two tokens of 1/4)
        ("forward", "bucket", 0.5 * ln(2) + 0.25 * ln(1 / 2)),
        ("reverse", "bucket", 0.25 * ln(1 / 2) + 0.5 * ln(2)),
        ("mixed", "bucket", 0.25 * ln(2)),
        ("jsd", "bucket", 0.5 * (0.5 * ln(4 / 3) + 0.25 * ln(2 / 3)) + 0.5 * (0.25 * ln(2 / 3) + 0.5 * ln(4 / 3))),
        ("skew_forward", "bucket", 0.5 * ln(0.5 / 0.275) + 0.25 * ln(0.25 / 0.475)),
        ("skew_reverse", "bucket", 0.25 * ln(0.25 / 0.475) + 0.5 * ln(0.5 / 0.275)),
        ("forward", "renormalize", 2 / 3 * ln(4 / 3) + 1 / 3 * ln(2 / 3)),
        ("reverse", "renormalize", 0.5 * ln(3 / 4) + 0.5 * ln(3 / 2)),
        ("forward", "zero", 2 / 3 * ln(8 / 3) + 1 / 3 * ln(4 / 3)),
        ("reverse", "zero", 0.25 * ln(3 / 8) + 0.25 * ln(3 / 4) + 0.5 * (ln(1 / 4) + 100)),
    ],
)
def test_values_by_hand(kl_type: str, tail: str, expected: float) -> None:
    teacher = torch.tensor([[1 / 2, 1 / 4]]).log()
    student = torch.tensor([[1 / 4, 1 / 4, 1 / 2]]).log()
    entropy = torch.tensor([ln(4)])
    (value,) = DistillLoss(kl_type=kl_type, tail=tail)(teacher, student, entropy).tolist()
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize(("kl_weight", "skew"), PARAMETERS)
@pytest.mark.parametrize("topk", [1, 6, 39])
def test_float32_matches_the_dense_reference(kl_type: str, tail: str, kl_weight: float, skew: float, topk: int) -> None:
    case = make_case(topk=topk)
    options = {"kl_type": kl_type, "tail": tail, "kl_weight": kl_weight, "skew": skew}
    value = loss_of(case, **options)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), reference_loss(case, case.logits_NV, **options), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize(("kl_weight", "skew"), PARAMETERS)
def test_gradients_are_right(kl_type: str, tail: str, kl_weight: float, skew: float) -> None:
    case = make_case(tokens=3)
    loss = DistillLoss(kl_type=kl_type, tail=tail, kl_weight=kl_weight, skew=skew)
    student, entropy = (x.requires_grad_() for x in student_classes(case.logits_NV, case.ids_NK, torch.float64))
    assert torch.autograd.gradcheck(lambda *xs: loss(case.teacher_logp_NK.double(), *xs), (student, entropy))


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
def test_equal_distributions_are_at_distance_zero(kl_type: str, tail: str) -> None:
    topk = 40 if tail == "zero" else 6  # the zero tail's teacher has nothing outside its top-k, so neither may q
    value = loss_of(make_case(topk=topk, closeness=1), kl_type=kl_type, tail=tail)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize(("kl_weight", "skew"), PARAMETERS)
def test_whole_vocabulary_is_the_full_divergence(kl_type: str, tail: str, kl_weight: float, skew: float) -> None:
    case = make_case(topk=40)
    options = {"kl_type": kl_type, "kl_weight": kl_weight, "skew": skew}
    full = reference_loss(case, case.logits_NV, tail="renormalize", **options)  # on all of V there is nothing to cut
    torch.testing.assert_close(loss_of(case, tail=tail, **options).double(), full, rtol=1e-5, atol=1e-6)


cases = st.builds(
    make_case,
    tokens=st.just(8),
    vocab=st.integers(10, 60),
    topk=st.integers(1, 10),
    seed=st.integers(0, 10_000),
    closeness=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
)
unit = st.floats(0, 1)


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@settings(max_examples=25, deadline=None)
@given(case=cases, kl_weight=unit, skew=unit)
def test_never_negative_and_always_finite(kl_type: str, tail: str, case: Case, kl_weight: float, skew: float) -> None:
    loss = DistillLoss(kl_type=kl_type, tail=tail, kl_weight=kl_weight, skew=skew)
    classes = [x.requires_grad_() for x in student_classes(case.logits_NV, case.ids_NK, torch.float32)]
    value = loss(case.teacher_logp_NK, *classes)
    gradients = torch.autograd.grad(value.sum(), classes, allow_unused=True)
    assert bool((value >= -2e-6).all()), value
    assert all(bool(x.isfinite().all()) for x in (value, *gradients) if x is not None)


@pytest.mark.parametrize("kl_type", DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(case=cases, kl_weight=unit, skew=unit)
def test_bucket_never_exceeds_the_full_divergence(kl_type: str, case: Case, kl_weight: float, skew: float) -> None:
    options = {"kl_type": kl_type, "kl_weight": kl_weight, "skew": skew}
    teacher_NV = make_teacher_whole(case)
    everything = torch.arange(teacher_NV.shape[1]).expand_as(teacher_NV)
    whole = Case(logits_NV=case.logits_NV, teacher_logp_NK=teacher_NV, ids_NK=everything)
    full = reference_loss(whole, case.logits_NV, tail="renormalize", **options)
    bucket = loss_of(case, tail="bucket", **options).double()
    assert bool((bucket <= full * (1 + 1e-5) + 1e-5).all()), (bucket - full).max()


def make_teacher_whole(case: Case) -> torch.Tensor:
    """A distribution [N, V] that has the case's top-k: what it leaves is spread evenly over all others."""
    num_others = case.logits_NV.shape[1] - case.ids_NK.shape[1]
    rest_N1 = 1 - case.teacher_logp_NK.double().exp().sum(-1, keepdim=True)
    others_N1 = (rest_N1.clamp_min(1e-30) / max(num_others, 1)).log()
    return others_N1.expand(case.logits_NV.shape).scatter(1, case.ids_NK, case.teacher_logp_NK.double())


@pytest.mark.parametrize("kl_type", DIVERGENCES)
@pytest.mark.parametrize("q_rest", [2e-2, 1e-6, 1e-9, 1e-20])
@pytest.mark.parametrize("p_rest", [0.3, 1e-3, 1e-5])
def test_bucket_is_precise_for_tiny_rests(kl_type: str, p_rest: float, q_rest: float) -> None:
    def probabilities(rest: float, first: float) -> torch.Tensor:
        return torch.tensor([[first * (1 - rest), (1 - first) * (1 - rest), rest]], dtype=torch.float64)

    teacher_13, student_13 = probabilities(p_rest, 0.6).log().float(), probabilities(q_rest, 0.7).log().float()
    loss = DistillLoss(kl_type=kl_type)
    values, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        student = student_13.to(dtype).requires_grad_()
        values.append(loss(teacher_13[:, :2].to(dtype), student, student.sum(-1)))
        gradients += torch.autograd.grad(values[-1].sum(), student)
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
def test_padding_adds_nothing(kl_type: str, tail: str) -> None:
    case = make_case()
    loss = DistillLoss(kl_type=kl_type, tail=tail)
    student, entropy = student_classes(case.logits_NV, case.ids_NK, torch.float32)
    pad = torch.full((student.shape[0], 3), PADDING_LOGP)
    padded = torch.cat([student[:, :-1], pad, student[:, -1:]], -1).requires_grad_()
    value = loss(torch.cat([case.teacher_logp_NK, pad], -1), padded, entropy)
    torch.testing.assert_close(value, loss(case.teacher_logp_NK, student, entropy))
    (gradient,) = torch.autograd.grad(value.sum(), padded)
    assert bool((gradient[:, -4:-1] == 0).all())


@pytest.mark.parametrize(("kl_type", "tail"), COMBINATIONS)
@pytest.mark.parametrize(("kl_weight", "skew"), PARAMETERS)
def test_a_teacher_probability_of_exactly_zero(kl_type: str, tail: str, kl_weight: float, skew: float) -> None:
    teacher = torch.tensor([[0.0, -math.inf, -math.inf]])
    student = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log().clamp_min(PADDING_LOGP).requires_grad_()
    value = DistillLoss(kl_type=kl_type, tail=tail, kl_weight=kl_weight, skew=skew)(teacher, student, -student.sum(-1))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("kl_type", DIVERGENCES)
@pytest.mark.parametrize("topk", [1, 2])
def test_nearly_certain_teacher(kl_type: str, topk: int) -> None:
    """float32 keeps one digit of 1 - 1e-7: the value is bounded and near, the gradient finite."""
    teacher = torch.tensor([[-1e-7, -30.0]])[:, :topk]
    student = torch.tensor([[0.9, 0.05, 0.05]]).log() if topk == 2 else torch.tensor([[0.9, 0.1]]).log()
    values = [
        DistillLoss(kl_type=kl_type)(teacher.to(t), student.to(t), student[:, 0].to(t))
        for t in (torch.float32, torch.float64)
    ]
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-4, atol=1e-6)


def test_rounding_of_full_probability_costs_nothing() -> None:
    """What an engine's log-probabilities of the whole vocabulary leave to 1 is rounding, of up to a dozen eps."""
    logits_NV = 3 * torch.randn(4000, 512, generator=torch.Generator().manual_seed(0)) + 15
    teacher_NV = logits_NV - logits_NV.logsumexp(-1, keepdim=True)
    rest_N = 1 - teacher_NV.double().exp().sum(-1)
    assert rest_N.max() > 8 * torch.finfo(torch.float32).eps
    student_NC = torch.cat([teacher_NV, torch.full((4000, 1), -70.0)], -1)
    value = DistillLoss(kl_type="forward")(teacher_NV, student_NC, torch.zeros(4000))
    assert float(value.abs().max()) < 1e-5


def test_a_users_own_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses.py").write_text(
        "def hellinger(logp, logq, *, kl_weight=1.0):\n"
        "    return kl_weight * ((logp / 2).exp() - (logq / 2).exp()) ** 2\n"
        "def pearson(logp, logq):\n"
        "    return (logp.exp() - logq.exp()) ** 2 / logp.exp()\n"
        "def greedy(logp, logq, *, sharpness):\n"
        "    return logp\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    term = SIGNATURES.resolve("own_losses:hellinger", kl_weight=0.25)
    value = term(torch.tensor(0.25).log(), torch.tensor(0.04).log())
    assert value.item() == pytest.approx(0.25 * (0.5 - 0.2) ** 2)
    DistillLoss(kl_type="own_losses:hellinger", tail="zero")
    with pytest.raises(ConfigError, match=r"own_losses:pearson: loss\.tail=zero needs terms that tend to"):
        DistillLoss(kl_type="own_losses:pearson", tail="zero")
    with pytest.raises(ConfigError, match="sharpness"):
        DistillLoss(kl_type="own_losses:greedy")
    with pytest.raises(ConfigError, match="own_losses:absent"):
        DistillLoss(kl_type="own_losses:absent")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kl_type": "forwrad"},
            r"loss\.kl_type=forwrad: must be one of forward, reverse, mixed, .*pkg\.module:function",
        ),
        ({"kl_type": "mixed", "tail": "none"}, r"loss\.tail=none: must be one of bucket, renormalize, zero"),
    ],
)
def test_mistakes_are_the_users(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillLoss(**options)
