"""Weights, the clip, the policy gradient and advantages, against dense float64 autograd of their formula."""

import math
from typing import Any

import pytest
import torch

from distill_cli.losses import token_weight
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.linear_divergence import HeadOutput
from distill_cli.losses.objective import BatchLoss, Facts, Objective, TokenWeight

from .supports import TOKENS, Pair, dense_logits, distributions, make_pair, reference, run, sampled_of

ENDS = (6, 17)
"""The first is among the sampled tokens."""
LENGTH = 5


def facts_of(pair: Pair, *, shift: float = 0.2, advantage: float = 0.0) -> Facts:
    """Two answers; the sampler was `shift` nats below the student, far below it at one token, and did not write one."""
    logq_N = dense_logits(pair.hidden_NH, pair.head).log_softmax(-1).gather(1, sampled_of(pair)[:, None])[:, 0]
    sampler_logp_N = logq_N.detach() - shift
    sampler_logp_N[3] -= 5
    return Facts(
        teachers_N=torch.ones(TOKENS, dtype=torch.int64),
        sampler_logp_N=sampler_logp_N,
        has_sampler_logp_N=torch.arange(TOKENS) != 4,
        position_N=torch.arange(TOKENS) % LENGTH,
        length_N=torch.tensor([LENGTH] * LENGTH + [TOKENS - LENGTH] * (TOKENS - LENGTH)),
        advantage_N=advantage * torch.linspace(-1, 1, TOKENS).double(),
    )


def weight_of(name: str, **parameters: Any) -> TokenWeight:
    family = token_weight.SIGNATURES
    return TokenWeight(family.resolve(name, **parameters), family.positional_of(name))


def run_objective(pair: Pair, objective: Objective, facts: Facts, **options: Any) -> HeadOutput:
    has_advantages = bool(facts.advantage_N.any())
    loss = BatchLoss({}, objective, facts, num_loss_tokens=torch.tensor(7.0), has_advantages=has_advantages)
    return run(pair, objective.loss, support=objective.support, token_loss=loss, **options)


def dense_loss(
    pair: Pair, objective: Objective, facts: Facts, weights_N: torch.Tensor, *, ends: tuple[int, ...] = ()
) -> torch.Tensor:
    """The formula at the top of objective.py, token by token: float64 [N]."""
    p_NV, q_NV = distributions(pair, ends=ends)
    sampled_N1 = sampled_of(pair)[:, None]
    logq_N = dense_logits(pair.hidden_NH, pair.head).log_softmax(-1).gather(1, sampled_N1)[:, 0]
    classes_N1 = torch.where(torch.isin(sampled_N1, torch.tensor(ends)), ends[0] if ends else 0, sampled_N1)
    gap_N = (p_NV.gather(1, classes_N1).log() - q_NV.gather(1, classes_N1).log())[:, 0].detach()
    divergence_N = reference(pair, support=objective.support, kl_type="mixed", tail="bucket", ends=ends)
    clip = objective.clip or math.inf
    ratio_N = (logq_N - facts.sampler_logp_N).exp()
    near_N = facts.has_sampler_logp_N & (ratio_N.detach() <= objective.max_ratio)
    near_N &= ratio_N.detach() >= 1 / objective.max_ratio
    ratio_N = torch.where(near_N, ratio_N, 0.0)
    total_N = objective.divergence_weight * weights_N * divergence_N.clamp_max(clip)
    total_N = total_N - objective.policy_gradient * weights_N * ratio_N * gap_N.clamp(-clip, clip)
    total_N = total_N - objective.likelihood * torch.where(facts.has_sampler_logp_N, 0.0, logq_N)
    return (total_N - ratio_N * facts.advantage_N) / 7


@pytest.mark.parametrize("support", ["teacher", "student", "union", "full"])
@pytest.mark.parametrize("ends", [(), ENDS])
@pytest.mark.parametrize(
    ("changes", "advantage"),
    [
        ({}, 0.0),
        ({"clip": 0.9}, 0.0),
        ({"weight": weight_of("first_fraction", fraction=0.5)}, 0.0),
        ({"divergence_weight": 0.0, "policy_gradient": 1.0}, 0.0),
        ({"policy_gradient": 0.5, "clip": 0.7, "weight": weight_of("position", half_life=2.0)}, 0.0),
        ({"divergence_weight": 0.0, "likelihood": 1.0}, 0.0),
        ({"likelihood": 0.5, "clip": 0.7, "policy_gradient": 0.5}, 0.3),
        ({}, 0.3),
        ({"divergence_weight": 0.0}, 0.3),
        ({"divergence_weight": 2.0, "policy_gradient": 0.5, "max_ratio": 1.1}, 0.3),
    ],
)
def test_losses_and_gradients_equal_dense(
    support: str, ends: tuple[int, ...], changes: dict[str, Any], advantage: float
) -> None:
    pair = make_pair().requires_grad()
    objective = Objective(DistillLoss(kl_type="mixed"), support=support, topk=7, **changes)
    facts = facts_of(pair, advantage=advantage)
    output = run_objective(pair, objective, facts, merged_eos_ids=ends)
    expected_N = dense_loss(pair, objective, facts, output.weight_N, ends=ends)
    torch.testing.assert_close(output.loss_N, expected_N.detach(), rtol=1e-9, atol=1e-10)
    found = torch.autograd.grad(output.loss, pair.trained)
    for got, want in zip(found, torch.autograd.grad(expected_N.sum(), pair.trained), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_policy_gradient_is_the_reverse_kl_in_expectation() -> None:
    """Over all tokens that could have been sampled, weighted by the sampler: the whole vocabulary's reverse KL."""
    pair = make_pair(tokens=1).requires_grad()
    logq_V = dense_logits(pair.hidden_NH, pair.head).log_softmax(-1)[0].detach()
    sampler_V = (logq_V + 0.3 * torch.sin(torch.arange(len(logq_V)))).softmax(-1)  # another student sampled
    total = [torch.zeros_like(one) for one in pair.trained]
    objective = Objective(
        DistillLoss(kl_type="mixed"), support="full", divergence_weight=0.0, policy_gradient=1.0, max_ratio=1e9
    )
    for token, probability in enumerate(sampler_V):
        one = torch.ones(1, dtype=torch.int64)
        zero = torch.zeros(1, dtype=torch.int64)
        facts = Facts(one, probability.log()[None], one > 0, zero, one, torch.zeros(1).double())
        options = {"sampled_ids_N": torch.tensor([token])}
        grads = torch.autograd.grad(run_objective(pair, objective, facts, **options).loss, pair.trained)
        total = [sum_ + probability * grad for sum_, grad in zip(total, grads, strict=True)]
    reverse = reference(pair, support="full", kl_type="reverse", tail="bucket").sum() / 7
    for got, want in zip(total, torch.autograd.grad(reverse, pair.trained), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_weights_by_hand() -> None:
    pair = make_pair()
    p_NV, q_NV = distributions(pair)
    student, teacher = (-torch.xlogy(x_NV, x_NV).sum(-1) for x_NV in (q_NV, p_NV))
    own_NK = q_NV.topk(7).indices
    expected = {
        "first_fraction": [1, 1, 0, 0, 0, 1, 1, 0, 0],  # 2 of 5, and 2 of 4
        "last_fraction": [0, 0, 0, 1, 1, 0, 0, 1, 1],
        "position": [2.0**-exponent for exponent in [0, 1, 2, 3, 4, 0, 1, 2, 3]],
        "student_entropy": (student >= 1.5).double(),
        "teacher_entropy": (teacher >= 1.5).double(),
        "teachability": p_NV.gather(1, own_NK).sum(-1),
    }
    parameters = {"first_fraction": {"fraction": 0.4}, "last_fraction": {"fraction": 0.4}, "position": {"half_life": 1}}
    assert expected.keys() == token_weight.TOKEN_WEIGHTS.keys()
    for name, values in expected.items():
        given = parameters.get(name, {"min_entropy": 1.5} if "entropy" in name else {})
        objective = Objective(DistillLoss(kl_type="mixed"), support="student", topk=7, weight=weight_of(name, **given))
        output = run_objective(pair, objective, facts_of(pair))
        values_N = torch.as_tensor(values, dtype=torch.float64)
        torch.testing.assert_close(output.weight_N, values_N, msg=name)
        torch.testing.assert_close(output.loss_N, values_N * output.divergence_N / 7)
