"""Advantages of sampled tokens that do not depend on the teacher: of the answers' rewards, and penalties.

Shape letters: R response tokens of one sequence.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from distill_cli.types import Rollout


@dataclass(frozen=True)
class AdvantageSettings:
    """The keys of the `loss` section with these names."""

    reward: float = 0.0
    penalty: float = 0.0
    penalty_share: float = 0.2


def advantages(
    rollouts: Sequence[Rollout], members: Sequence[int], settings: AdvantageSettings
) -> dict[int, torch.Tensor]:
    """Return the advantages of an update's sequences: float32 [R] by place, the same on every rank.

    Args:
        rollouts: all of the step, among which the answers to one prompt are compared.
        members: places of the update's sequences.
    """
    found = {place: torch.zeros(len(rollouts[place].sample.token_ids)) for place in members}
    if settings.reward:
        by_answer = group_advantages(rollouts)
        for place in members:
            found[place] += settings.reward * by_answer.get(place, 0.0)
    if settings.penalty:
        for place, penalty_R in penalties(rollouts, members, settings).items():
            found[place] += penalty_R
    return found


def group_advantages(rollouts: Sequence[Rollout]) -> dict[int, float]:
    """Return by place (r - mean) / s over the student's answers to each prompt, 0 where they have the same reward.

    s is the sample's standard deviation, as in GRPO (DeepSeekMath, Shao et al. 2024, section 4.1.2).
    """
    groups: dict[int, dict[int, float]] = defaultdict(dict)
    for place, rollout in enumerate(rollouts):
        if rollout.reward is not None and rollout.sample.source == "student":
            groups[rollout.prompt.index][place] = rollout.reward
    found = dict[int, float]()
    for rewards in groups.values():
        spread = stdev(rewards.values()) if len(rewards) > 1 else 0.0
        mean = fmean(rewards.values())
        found |= {place: (reward - mean) / spread if spread > 0 else 0.0 for place, reward in rewards.items()}
    return found


def penalties(
    rollouts: Sequence[Rollout], members: Sequence[int], settings: AdvantageSettings
) -> Mapping[int, torch.Tensor]:
    """Return by place -penalty at the sampled tokens with the lowest log-probability, and 0 elsewhere.

    It is scaled so that the loss, which is divided by all trained tokens, is that of these divided by their number.
    """
    masks, logps = {}, {}
    for place in members:
        sample = rollouts[place].sample
        masks[place] = torch.tensor(sample.trained or [True] * len(sample.token_ids), dtype=torch.bool)
        if sample.logp is not None and sample.source == "student":
            logps[place] = torch.tensor(sample.logp).masked_fill(~masks[place], math.inf)
    num_trained = sum(int(mask_R.sum()) for mask_R in masks.values())
    known = torch.cat([logp_R[logp_R < math.inf] for logp_R in logps.values()] or [torch.zeros(0)])
    if not len(known):
        return {}
    limit = known.kthvalue(math.ceil(settings.penalty_share * len(known))).values
    size = settings.penalty * num_trained / int((known <= limit).sum())
    return {place: -size * (logp_R <= limit).float() for place, logp_R in logps.items()}
