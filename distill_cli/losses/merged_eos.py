"""Merge the tokens that end an answer into one class of the teacher's top-k.

A Base student ends with one token and an instruct teacher with another. Both end the answer, so the loss compares the
probability of ending: the sum over all of these tokens, for either model. `head.py` merges the student's;
docs/losses.md has the mathematics.

Shape letters: R response tokens, K the teacher's top-k, M tokens of the class.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from distill_cli.losses.distill_loss import PADDING_LOGP
from distill_cli.types import TeacherScores

PADDING_ID = -1


def merge_topk(scores: TeacherScores, *, sampled_ids: Sequence[int], merged_eos_ids: Sequence[int]) -> TeacherScores:
    """Return the scores with the tokens of `merged_eos_ids` as one, under the id of the first.

    If several are among the top-k, their probabilities add up and the places that become free are padding. The
    probability of one that is not among them stays in the rest: no more than the K-th token's.

    Args:
        sampled_ids: the response's tokens. The log-probability of one in the class becomes the class's.
    """
    if not merged_eos_ids or len(scores.topk_ids) == 0:
        return scores
    ids_M = torch.tensor(merged_eos_ids)
    ids_RK, logp_RK = scores.topk_ids, scores.topk_logp
    member_RK = torch.isin(ids_RK.long(), ids_M)
    class_R = logp_RK.masked_fill(~member_RK, -torch.inf).logsumexp(-1)
    first_RK = member_RK & (member_RK.cumsum(-1) == 1)
    ids_RK = torch.where(member_RK, torch.where(first_RK, merged_eos_ids[0], PADDING_ID), ids_RK)
    merged_RK = torch.where(first_RK, class_R[:, None], PADDING_LOGP)
    logp_RK = torch.where(member_RK, merged_RK, logp_RK)
    logp_RK, order_RK = logp_RK.sort(dim=-1, descending=True, stable=True)  # the class may have overtaken others
    ends_R = torch.isin(torch.tensor(sampled_ids), ids_M)
    return replace(
        scores,
        topk_ids=ids_RK.gather(1, order_RK).int(),
        topk_logp=logp_RK,
        sampled_logp=torch.where(ends_R, torch.maximum(scores.sampled_logp, class_R), scores.sampled_logp),
    )
