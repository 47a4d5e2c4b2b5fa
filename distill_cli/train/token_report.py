"""Record both models' predictions at every token of some answers, for the report, and their means as metrics.

One forward pass without gradient over sequences that the teacher has scored. It runs when the run validates, on prompts
of its own, and leaves training steps alone.

Shape letters: N response tokens of a micro-batch, M likeliest tokens kept of each model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.losses.linear_divergence import HeadOutput
from distill_cli.losses.merged_eos import PADDING_ID
from distill_cli.losses.teacher_chunk import is_among
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch
from distill_cli.rollout.remote import SamplingRanks
from distill_cli.rollout.workers import RolloutWorker, ScoringWorker
from distill_cli.student.model import Student
from distill_cli.types import Prompt, Rollout, TokenViews

NUM_TOP = 5
"""Likeliest tokens of each model that are written; of the teacher at most `loss.topk` (fewer if end tokens are
merged)."""
TokenValues = tuple[Any, ...]
"""Values of one token, in the order of TokenViews."""
NO_LOSS: TokenValues = (*[None] * 6, *[[]] * 4)
"""Values of a token without loss, such as an environment's."""


@dataclass(frozen=True)
class ProbeReport:
    """Answer the same prompts each time, so that only the student differs."""

    prompts: Sequence[Prompt]
    worker: RolloutWorker | SamplingRanks
    scoring: ScoringWorker
    student: Student
    folder: RolloutsFolder
    topk: int
    """Likeliest tokens of each model that are compared: loss.topk."""

    def write(self, step: int) -> dict[str, float]:
        """Write step_<n>.parquet: the student's answers after `step`, with both models' views. A collective.

        Returns:
            The means over all tokens of the answers: `probe/...`.
        """
        stages = self.worker.stages
        with self.worker.ready(), stages("record"):
            rollouts = self.worker.sample(self.prompts, step=0)  # the same seeds each time
        scored = self.scoring.score(rollouts, stage="record")
        with stages("record"):
            batches = scored.micro_batches(stages.parallel)
            one, num_top = torch.ones((), device=self.student.device), max(self.topk, NUM_TOP)
            outputs = self.student.evaluate(batches, num_loss_tokens=one, num_top=num_top)
            views = token_views(batches, outputs, rollouts, parallel=stages.parallel)
            self.folder.write(f"step_{step}.parquet", rollouts, views=views)
            return probe_metrics(outputs, topk=self.topk, parallel=stages.parallel)


def probe_metrics(outputs: Sequence[HeadOutput], *, topk: int, parallel: Parallel) -> dict[str, float]:
    """Return the means of `compared` over all tokens of all ranks. A collective; every rank has an output."""
    values = [compared(output, topk=topk) for output in outputs]
    sums = torch.stack([torch.stack([one[name].sum() for one in values]).sum() for name in values[0]])
    number = torch.tensor([sum(len(output.loss_N) for output in outputs)], device=sums.device)
    *totals, num_tokens = parallel.all_sum(torch.cat([sums, number])).tolist()
    return {f"probe/{name}": total / max(num_tokens, 1) for name, total in zip(values[0], totals, strict=True)}


def compared(output: HeadOutput, *, topk: int) -> dict[str, torch.Tensor]:
    """Return how both models compare at each token, float [N] each."""
    theirs_NK = output.teacher_top_ids_NM[:, :topk]
    is_shared_NK = is_among(theirs_NK, output.top_ids_NM[:, :topk])
    return {
        "kl_forward": output.kl_forward_N,
        "kl_reverse": output.kl_reverse_N,
        "entropy": output.entropy_N,
        "teacher_entropy": output.teacher_entropy_N,
        "top1_agreement": (output.argmax_N == output.teacher_argmax_N).float(),
        "topk_overlap": is_shared_NK.sum(-1) / (theirs_NK >= 0).sum(-1),
        "teachability": output.teachability_N,
    }


def token_views(
    batches: Sequence[MicroBatch], outputs: Sequence[HeadOutput], rollouts: Sequence[Rollout], *, parallel: Parallel
) -> list[TokenViews]:
    """Return the views of each rollout on the main rank, and none on the others. A collective.

    Args:
        batches: this rank's part of the plans for these rollouts.
        outputs: of the batches.
    """
    mine: dict[tuple[int, int], TokenValues] = {}  # by place of the sequence, and of the token in its response
    if parallel.tensor.get_local_rank() == 0:  # tensor ranks hold equal copies
        for batch, output in zip(batches, outputs, strict=True):
            mine |= dict(zip(map(tuple, batch.origins.tolist()), token_values(output), strict=True))
    parts = [mine] * parallel.size if parallel.is_main else None
    dist.gather_object(mine, parts, dst=0)
    values = {origin: value for part in parts or [] for origin, value in part.items()}
    views = []
    for place, rollout in enumerate(rollouts if parallel.is_main else []):
        rows = [values.get((place, token), NO_LOSS) for token in range(len(rollout.sample.token_ids))]
        views.append(TokenViews(*map(list, zip(*rows, strict=True))))
    return views


def token_values(output: HeadOutput) -> list[TokenValues]:
    """Return the values of each response token of a micro-batch."""
    teacher_ids = [[i for i in ids if i != PADDING_ID] for ids in output.teacher_top_ids_NM[:, :NUM_TOP].tolist()]
    # Padding comes last.
    all_logp = output.teacher_top_logp_NM[:, :NUM_TOP].tolist()
    teacher_logp = [logp[: len(ids)] for ids, logp in zip(teacher_ids, all_logp, strict=True)]
    divergences = (output.loss_N, output.kl_forward_N, output.kl_reverse_N)
    at_token = (output.entropy_N, output.sampled_logp_N, output.teacher_sampled_logp_N)
    likeliest = (output.top_ids_NM[:, :NUM_TOP], output.top_logp_NM[:, :NUM_TOP])
    columns = [column.tolist() for column in (*divergences, *at_token, *likeliest)]
    return list(zip(*columns, teacher_ids, teacher_logp, strict=True))
