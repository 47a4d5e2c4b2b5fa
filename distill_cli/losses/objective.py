"""What training minimises: a divergence from the teacher at each token, weighted and clipped, and further terms.

At a token with divergence D, weight w and the student's probability q of the sampled token y, ratio r = q / q' with the
sampler's q', teacher's p, and an advantage A that knows nothing of the teacher (a verifier's reward, a penalty):

    loss = divergence_weight w clip(D) - policy_gradient w r clip(log p(y) - log q(y)) - r A - likelihood log q(y)

Only D, r and the last term have gradients. The gradient of the second term is an estimate, from one token, of the
reverse KL's (as in tinker-cookbook's distillation/train_on_policy.py and prime-rl's `opd` loss). r is the importance
ratio of the current student and the one that sampled; tokens at which it is above `max_ratio`, or below its inverse,
and tokens that the student did not sample have neither the second nor the third term. The last term, cross-entropy, is
that of the tokens that the student did not sample, and of no others.

Shape letters: N tokens of a micro-batch, n of a chunk, K ids of the support, C = K + 1 classes: the ids, then the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.teacher_chunk import Support
from distill_cli.losses.token_loss import TokenLoss, Tokens


@dataclass(frozen=True)
class TokenWeight:
    """Weighs tokens (`losses.token_weight`)."""

    function: Callable[..., torch.Tensor]
    reads: tuple[str, ...]
    """The facts that it is called with."""


@dataclass(frozen=True)
class Objective:
    """The loss against a teacher."""

    loss: DistillLoss
    temperature: float = 1.0
    """Divides both models' logits."""
    support: Support = "teacher"
    topk: int = 64
    divergence_weight: float = 1.0
    weight: TokenWeight | None = None
    clip: float | None = None
    """Most of a token's divergence, and of the size of its log-ratio in the policy gradient, in nats."""
    policy_gradient: float = 0.0
    likelihood: float = 0.0
    max_ratio: float = 8.0
    by_rank: bool = False
    """Compare both models' likeliest tokens by rank, whatever they are."""

    @property
    def is_plain(self) -> bool:
        """Whether the loss is the divergence as it is."""
        return self == self.plain

    @property
    def plain(self) -> Objective:
        """The divergence alone, as it is."""
        return replace(self, divergence_weight=1.0, weight=None, clip=None, policy_gradient=0.0, likelihood=0.0)


@dataclass(frozen=True)
class Facts:
    """What a micro-batch knows of its tokens, [N] each."""

    teachers_N: torch.Tensor
    """int64: the set of the token's teachers (`Prompt.teachers`)."""
    sampler_logp_N: torch.Tensor
    """float32: by the sampler, at temperature 1."""
    has_sampler_logp_N: torch.Tensor
    """bool: False where the student did not sample the token."""
    position_N: torch.Tensor
    length_N: torch.Tensor
    """int64: see `token_weight.FACTS`."""
    advantage_N: torch.Tensor
    """float32: of rewards and penalties, weighted."""

    def take(self, rows: torch.Tensor | slice) -> Facts:
        return Facts(*(values[rows] for values in vars(self).values()))


class BatchLoss(TokenLoss):
    """The loss of a micro-batch's tokens, which may have teachers with objectives of their own."""

    def __init__(
        self,
        objectives: Mapping[int, Objective],
        default: Objective,
        facts: Facts,
        *,
        num_loss_tokens: torch.Tensor,
        has_advantages: bool = False,
    ) -> None:
        """
        Args:
            objectives: by set of teachers, of those that are not `default`'s.
            num_loss_tokens: scalar; the one division is by it.
            has_advantages: whether `facts.advantage_N` is read.
        """
        kinds = facts.teachers_N.unique().tolist() if objectives else []
        found = {teachers: objectives.get(teachers, default) for teachers in kinds}
        self._kinds = found if len(found) > 1 else {}
        """Empty if all tokens have one."""
        self._objective = next(iter(found.values())) if len(found) == 1 else default
        self._facts, self._num_loss_tokens, self._has_advantages = facts, num_loss_tokens, has_advantages
        weights = [one.weight for one in (self._kinds or {0: self._objective}).values() if one.weight]
        self.reads_teachability = any("teachability" in weight.reads for weight in weights)

    @property
    def terms(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:  # type: ignore[override]
        return self._objective.loss.divergence

    def divergence(
        self, teacher_logp_nK: torch.Tensor, student_logp_nC: torch.Tensor, entropy_n: torch.Tensor, rows: slice
    ) -> torch.Tensor:
        def of(objective: Objective, mine_n: torch.Tensor | slice) -> torch.Tensor:
            return objective.loss(teacher_logp_nK[mine_n], student_logp_nC[mine_n], entropy_n[mine_n])

        return self._by_kind(of, rows, like_n=student_logp_nC[:, 0])

    def weights(self, divergence_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        facts = self._facts.take(rows)
        known = {
            "position": facts.position_N,
            "length": facts.length_N,
            "divergence": divergence_n,
            "student_entropy": tokens.entropy_n,
            "teacher_entropy": tokens.teacher_entropy_n,
            "student_logp": tokens.sampled_logp_n,
            "teacher_logp": tokens.teacher_sampled_logp_n,
            "teachability": tokens.teachability_n,
        }

        def of(objective: Objective, mine_n: torch.Tensor | slice) -> torch.Tensor:
            if objective.weight is None:
                return torch.ones_like(divergence_n[mine_n])
            values = {name: known[name] for name in objective.weight.reads}
            given = {name: value[mine_n] for name, value in values.items() if value is not None}
            return objective.weight.function(**given).to(divergence_n.dtype)

        return self._by_kind(of, rows, like_n=divergence_n)

    def total(self, divergence_n: torch.Tensor, weights_n: torch.Tensor, tokens: Tokens, rows: slice) -> torch.Tensor:
        facts = self._facts.take(rows)
        log_ratio_n = tokens.sampled_logp_n - facts.sampler_logp_N

        def of(objective: Objective, mine_n: torch.Tensor | slice) -> torch.Tensor:
            if objective.is_plain and not self._has_advantages:
                return divergence_n[mine_n]
            loss_n, weight_n = divergence_n[mine_n], weights_n[mine_n]
            loss_n = loss_n if objective.clip is None else loss_n.clamp_max(objective.clip)
            loss_n = objective.divergence_weight * weight_n * loss_n
            if objective.likelihood:
                others_n = torch.where(facts.has_sampler_logp_N, 0.0, tokens.sampled_logp_n)[mine_n]
                loss_n = loss_n - objective.likelihood * others_n
            if not objective.policy_gradient and not self._has_advantages:
                return loss_n
            ratio_n = torch.where(
                is_near(log_ratio_n, facts.has_sampler_logp_N, objective)[mine_n], log_ratio_n[mine_n], -torch.inf
            ).exp()
            advantage_n = facts.advantage_N[mine_n]
            if objective.policy_gradient:
                gap_n = (tokens.teacher_sampled_logp_n - tokens.class_logp_n)[mine_n]
                gap_n = gap_n if objective.clip is None else gap_n.clamp(-objective.clip, objective.clip)
                advantage_n = advantage_n + objective.policy_gradient * weight_n * gap_n
            return loss_n - ratio_n * advantage_n

        return self._by_kind(of, rows, like_n=divergence_n) / self._num_loss_tokens

    def _by_kind(
        self,
        of: Callable[[Objective, torch.Tensor | slice], torch.Tensor],
        rows: slice,
        *,
        like_n: torch.Tensor,
    ) -> torch.Tensor:
        """Return the values [n] of each token's own objective."""
        if not self._kinds:
            return of(self._objective, slice(None))
        teachers_n, values_n = self._facts.teachers_N[rows], torch.zeros_like(like_n)
        for teachers, objective in self._kinds.items():
            mine_n = teachers_n == teachers
            values_n = values_n.masked_scatter(mine_n, of(objective, mine_n))
        return values_n


def is_near(log_ratio_n: torch.Tensor, is_sampled_n: torch.Tensor, objective: Objective) -> torch.Tensor:
    """Return whether a token has the terms of the importance ratio: bool [n]."""
    return is_sampled_n & (log_ratio_n.detach().abs() <= math.log(objective.max_ratio))


def calls_of(
    teachers_N: torch.Tensor, objectives: Mapping[int, Objective], default: Objective, *, is_apart: bool
) -> list[tuple[Objective, list[int]]]:
    """Return the sets of teachers whose tokens one call of the head takes together, each with an objective of theirs.

    Tokens share a call if they share a temperature. Of teachers that are apart, since their hidden states are given or
    their tokens are their own, only those of one do.
    """
    calls: dict[tuple[object, ...], tuple[Objective, list[int]]] = {}
    is_simple = not is_apart and all(one.temperature == default.temperature for one in objectives.values())
    for teachers in [0] if is_simple else teachers_N.unique().tolist():
        one = objectives.get(teachers, default)
        calls.setdefault((one.temperature, teachers if is_apart else None), (one, []))[1].append(teachers)
    return list(calls.values())
