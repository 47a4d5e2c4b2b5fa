"""What student and teacher say at every token of some answers: the report's disagreement view is drawn from it.

One forward pass without gradient over sequences that the teacher has scored. Training steps have no part in it: it runs
on prompts of its own, when the run validates.

Shape letters: N response tokens of a micro-batch, M the likeliest tokens that are kept of each model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist

from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.losses.distill_loss import bucket_classes
from distill_cli.losses.divergence import forward, reverse
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch, micro_batches
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.model import Student
from distill_cli.types import Prompt, Rollout, TokenViews

NUM_TOP = 5
"""Tokens of each model's distribution that are kept, of the teacher's at most `loss.topk` (less where ends are one)."""
UNSEEN = (*[None] * 6, *[[]] * 4)
"""Of a token that reaches no loss, such as an environment's: in the order of TokenViews."""


@dataclass(frozen=True)
class ProbeReport:
    """Answers the same prompts each time it is written: what differs is the student."""

    prompts: Sequence[Prompt]
    worker: RolloutWorker
    scoring: ScoringWorker
    student: Student
    folder: RolloutsFolder

    def write(self, step: int) -> None:
        """Write step_<n>.parquet: the student's answers after `step`, with both models' views. A collective."""
        with self.worker.ready(), self.worker.stages("record"):
            rollouts = self.worker.sample(self.prompts, step=0)  # with the same seeds each time
        scored = self.scoring.score(rollouts, stage="record")
        parallel = self.worker.stages.parallel
        with self.worker.stages("record"):
            batches = [
                batch
                for plan in scored.plans
                for batch in micro_batches(plan, rollouts, scored.scores, parallel=parallel)
            ]
            views = token_views(batches, rollouts, student=self.student, parallel=parallel)
            self.folder.write(f"step_{step}.parquet", rollouts, views=views)


def token_views(
    batches: Sequence[MicroBatch], rollouts: Sequence[Rollout], *, student: Student, parallel: Parallel
) -> list[TokenViews]:
    """Return the views of each rollout on the main rank, and none on the others. A collective.

    Args:
        batches: this rank's part of the plans for these rollouts.
    """
    mine = _views_here(batches, student)
    is_first = parallel.tensor.get_local_rank() == 0  # tensor ranks hold equal copies
    everyone = [None] * parallel.size if parallel.is_main else None
    dist.gather_object(mine if is_first else {}, everyone, dst=0)
    if not parallel.is_main:
        return []
    found: dict[int, dict[int, tuple]] = defaultdict(dict)
    for part in everyone:
        for (place, token), values in part.items():
            found[place][token] = values
    names = [field.name for field in fields(TokenViews)]
    views = []
    for place, rollout in enumerate(rollouts):
        every_token = range(len(rollout.sample.token_ids))
        columns = zip(*(found[place].get(token, UNSEEN) for token in every_token), strict=True)
        views.append(TokenViews(**dict(zip(names, map(list, columns), strict=True))))
    return views


def _views_here(batches: Sequence[MicroBatch], student: Student) -> dict[tuple[int, int], tuple]:
    """(sequence, token of its response) -> its values in the order of TokenViews, of this rank's tokens."""
    one = torch.ones((), device=student.device)
    outputs = student.evaluate(batches, num_loss_tokens=one, num_top=NUM_TOP)
    found: dict[tuple[int, int], tuple] = {}
    for batch, output in zip(batches, outputs, strict=True):
        found |= dict(zip(map(tuple, batch.origins.tolist()), _token_values(batch, output), strict=True))
    return found


def _token_values(batch: MicroBatch, output: HeadOutput) -> list[tuple]:
    """One tuple a token, in the order of TokenViews."""
    scores = batch.scores
    topk_logp = scores.topk_logp.to(output.student_logp_NC.device)
    teacher_NC, student_NC = bucket_classes(topk_logp, output.student_logp_NC)
    teacher_ids = [[i for i in ids if i != PADDING_ID] for ids in scores.topk_ids[:, :NUM_TOP].tolist()]
    teacher_top_logp = scores.topk_logp[:, :NUM_TOP].tolist()
    columns = (
        output.loss_N.tolist(),
        forward(teacher_NC, student_NC).sum(-1).tolist(),
        reverse(teacher_NC, student_NC).sum(-1).tolist(),
        output.entropy_N.tolist(),
        output.sampled_logp_N.tolist(),
        scores.sampled_logp.tolist(),
        output.top_ids_NM.tolist(),
        output.top_logp_NM.tolist(),
        teacher_ids,
        [logps[: len(ids)] for ids, logps in zip(teacher_ids, teacher_top_logp, strict=True)],  # padding comes last
    )
    return list(zip(*columns, strict=True))
