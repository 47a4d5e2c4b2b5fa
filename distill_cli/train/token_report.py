"""What student and teacher say at every token of some sequences: the report's disagreement view is drawn from it.

One forward pass without gradient over sequences that the teacher has scored. Training steps have no part in it: it runs
on prompts of its own, where the run validates.

Shape letters: N response tokens of a micro-batch, M the likeliest tokens that are kept of each model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from distill_cli.losses.distill_loss import bucket_classes
from distill_cli.losses.divergence import forward, reverse
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch
from distill_cli.student.model import Student
from distill_cli.types import Prompt, Rollout, TokenViews

NUM_TOP = 5
"""Tokens of each model's distribution that are kept, of the teacher's at most `loss.topk` (less where ends are one)."""
UNSEEN = (*[None] * 6, *[[]] * 4)
"""Of a token that reaches no loss, such as an environment's: in the order of TokenViews."""


@dataclass(frozen=True)
class Watched:
    """The prompts that are answered again and again, for a look at how the answers change."""

    prompts: Sequence[Prompt]
    token_text: Callable[[int], str]


def view_tokens(
    batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], *, student: Student, parallel: Parallel
) -> None:
    """Fills in the rollouts' `views` on the main rank. A collective.

    Args:
        batches: this rank's part of the plan for these rollouts, as in training.
        rollouts: all that were planned; this rank's have the teacher's scores.
    """
    mine = _views_here(batches, rollouts, student=student, parallel=parallel)
    is_first = parallel.tensor.get_local_rank() == 0  # tensor ranks hold equal copies
    everyone = [None] * parallel.size if parallel.is_main else None
    dist.gather_object(mine if is_first else {}, everyone, dst=0)
    if not parallel.is_main:
        return
    found: dict[int, dict[int, tuple]] = defaultdict(dict)
    for part in everyone:
        for (member, token), values in part.items():
            found[member][token] = values
    for member, tokens in found.items():
        every_token = range(len(rollouts[member].sample.token_ids))
        columns = zip(*(tokens.get(token, UNSEEN) for token in every_token), strict=True)
        names = [field.name for field in fields(TokenViews)]
        rollouts[member].views = TokenViews(**dict(zip(names, map(list, columns), strict=True)))


@torch.no_grad()
def _views_here(
    batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], *, student: Student, parallel: Parallel
) -> dict[tuple[int, int], tuple]:
    """(planned sequence, token of its response) -> its values in the order of TokenViews, of this rank's tokens."""
    found: dict[tuple[int, int], tuple] = {}
    for batch in batches:
        device_batch = batch.to(parallel.device)
        one = torch.ones((), device=parallel.device)
        _, output = student(device_batch, num_loss_tokens=one, num_top=NUM_TOP)
        origins = [tuple(origin) for origin in batch.origins.tolist()]
        teacher_logp = [float(rollouts[member].scores.sampled_logp[token]) for member, token in origins]
        found |= dict(zip(origins, _token_values(device_batch, output, teacher_logp), strict=True))
    # Outside training no backward pass gives the gathered parameters back.
    student.reshard()
    return found


def _token_values(batch: MicroBatch, output: HeadOutput, teacher_logp: list[float]) -> list[tuple]:
    """One tuple a token, in the order of TokenViews."""
    teacher_NC, student_NC = bucket_classes(batch.topk_logp, output.student_logp_NC)
    teacher_ids = [[i for i in ids if i != PADDING_ID] for ids in batch.topk_ids[:, :NUM_TOP].tolist()]
    teacher_top_logp = batch.topk_logp[:, :NUM_TOP].tolist()
    columns = (
        output.loss_N.tolist(),
        forward(teacher_NC, student_NC).sum(-1).tolist(),
        reverse(teacher_NC, student_NC).sum(-1).tolist(),
        output.entropy_N.tolist(),
        output.sampled_logp_N.tolist(),
        teacher_logp,
        output.top_ids_NM.tolist(),
        output.top_logp_NM.tolist(),
        teacher_ids,
        [logps[: len(ids)] for ids, logps in zip(teacher_ids, teacher_top_logp, strict=True)],  # padding comes last
    )
    return list(zip(*columns, strict=True))
