"""Mix the distributions of several teachers into one, from each one's top-k.

The mixture of a token that is in every top-k, and of the response token, is exact. A token outside a teacher's top-k
counts as if that teacher gave it nothing: its probability there, at most that of the K-th token, stays in the rest. So
at most `uncertain_mass` of a position's probability is in the rest instead of at a token; it is 0 if loss.topk is the
vocabulary.

Shape letters: R response tokens, K the teachers' top-k, S teachers, M = S K tokens of all top-k, repeated ones apart.
"""

from collections.abc import Sequence

import torch

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.types import TeacherScores


def mix(parts: Sequence[TeacherScores], weights: Sequence[float]) -> TeacherScores:
    """Return the top-k of the mixture of several teachers' distributions at the same tokens.

    Args:
        parts: the teachers' scores, [R, K] each.
        weights: of each teacher; they add up to 1.
    """
    topk = parts[0].topk_ids.shape[1]
    ids_RM = torch.cat([part.topk_ids for part in parts], dim=1).long()
    share_RM = torch.cat([w * part.topk_logp.double().exp() for part, w in zip(parts, weights, strict=True)], dim=1)
    ids_RM, order_RM = ids_RM.sort(dim=1, stable=True)
    is_first_RM = torch.ones_like(ids_RM, dtype=torch.bool)
    is_first_RM[:, 1:] = ids_RM[:, 1:] != ids_RM[:, :-1]
    place_RM = is_first_RM.cumsum(1) - 1  # equal ids have one place
    mixed_RM = torch.zeros_like(share_RM).scatter_add_(1, place_RM, share_RM.gather(1, order_RM))
    known_RM = torch.full_like(ids_RM, PADDING_ID).scatter_(1, place_RM, ids_RM)
    mixed_RK, place_RK = mixed_RM.sort(dim=1, descending=True, stable=True)
    mixed_RK, ids_RK = mixed_RK[:, :topk], known_RM.gather(1, place_RK[:, :topk])
    logp_RK = mixed_RK.log().float().clamp_min(PADDING_LOGP)
    sampled = torch.stack([part.sampled_logp.double() for part in parts]).exp()
    sampled_R = torch.tensor(weights, dtype=torch.float64) @ sampled
    ids_RK = ids_RK.masked_fill(mixed_RK == 0, PADDING_ID)
    return TeacherScores.of_topk(ids_RK.int().contiguous(), logp_RK.contiguous(), sampled_R.log().float())


def uncertain_mass(parts: Sequence[TeacherScores], weights: Sequence[float]) -> torch.Tensor:
    """Return the probability of the mixture that may be in the rest instead of at a token: float64 [R].

    It is what each teacher leaves to tokens outside its top-k, where another teacher has a token that it has not.
    """
    total_R = torch.zeros(len(parts[0].sampled_logp), dtype=torch.float64)
    sorted_ids = [part.topk_ids.sort(dim=1).values for part in parts]
    for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        differs_R = torch.stack([(sorted_ids[index] != other).any(1) for other in sorted_ids]).any(0)
        total_R += weight * differs_R * (1 - part.topk_logp.double().exp().sum(1)).clamp_min(0)
    return total_R
