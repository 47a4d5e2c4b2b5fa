"""What a step's line in metrics.jsonl says, worked out from what the step left.

Shape letters: N response tokens of a micro-batch, C the metrics that are averaged over them.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from statistics import fmean

import torch

from distill_cli.engines.vllm_patches import pooled_bytes
from distill_cli.losses.distill_loss import bucket_classes
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.metrics import METRICS, Tokens
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import BatchPlan, MicroBatch
from distill_cli.student.flops import peak_flops, train_flops
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult
from distill_cli.types import Rollout

TOKEN_METRICS = [metric for metric in METRICS if metric.formula is not None]
"""Those that are averaged over response tokens."""


def train_metrics(
    results: Sequence[tuple[Sequence[MicroBatch], StepResult]], *, is_current: bool, parallel: Parallel
) -> dict[str, float]:
    """Means over the response tokens of the step's updates, of all ranks. A collective.

    Args:
        is_current: the batch's. Log-probabilities of sampler and trainer differ by `rollout/engine_mismatch` if both
            have the same weights, and by `rollout/drift` if not.
    """
    device = parallel.device
    sums = torch.zeros(len(TOKEN_METRICS), device=device)
    mismatch, num_sampled = torch.zeros((), device=device), torch.zeros((), device=device)
    for update, (batches, result) in enumerate(results):
        for batch, output in zip(batches, result.outputs, strict=True):
            batch = batch.to(device)
            sums += token_metrics_CN(batch, output).sum(-1)
            if update == 0:  # later ones see a student that has moved on from what was sampled
                mismatch += (batch.sampler_logp - output.sampled_logp_N)[batch.has_sampler_logp].abs().sum()
                num_sampled += batch.has_sampler_logp.sum()
    sums = torch.cat([sums, torch.stack([mismatch, num_sampled])])
    *totals, mismatch_total, sampled_total = parallel.all_sum(sums).tolist()
    num_tokens = sum(result.num_response_tokens for _, result in results)
    loss = sum(result.loss * result.num_response_tokens for _, result in results)
    difference = "rollout/engine_mismatch" if is_current else "rollout/drift"
    return {
        "train/loss": loss / max(num_tokens, 1),
        "train/grad_norm": sum(result.grad_norm for _, result in results) / len(results),
        "train/response_tokens": num_tokens,
        "train/skipped_updates": sum(not result.is_finite for _, result in results),
        **{metric.name: total / max(num_tokens, 1) for metric, total in zip(TOKEN_METRICS, totals, strict=True)},
        **({difference: mismatch_total / sampled_total} if sampled_total else {}),
    }


def token_metrics_CN(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
    """Return each of TOKEN_METRICS at each response token: float [C, N]."""
    tokens = tokens_of(batch, output)
    return torch.stack([metric.formula(tokens) for metric in TOKEN_METRICS])


def tokens_of(batch: MicroBatch, output: HeadOutput) -> Tokens:
    """Return what both models say at the response tokens of a micro-batch."""
    scores = batch.scores
    teacher_NC, student_NC = bucket_classes(scores.topk_logp, output.student_logp_NC)
    return Tokens(teacher_NC, student_NC, scores.topk_ids, output.argmax_N, output.entropy_N, output.loss_N)


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Means over the step's sequences, which every rank knows: the student's own, or all where none is."""
    own = [rollout for rollout in rollouts if rollout.sample.source == "student"]
    share, rollouts = len(own) / len(rollouts), own or rollouts
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    metrics = {
        "rollout/mean_length": fmean(len(rollout.sample.written_ids) for rollout in rollouts),
        "rollout/truncated_rate": fmean(rollout.sample.finish_reason == "length" for rollout in rollouts),
    }
    if share < 1:
        metrics["rollout/on_policy_fraction"] = share
    if any(rollout.sample.trained is not None for rollout in rollouts):  # an environment answered
        metrics["rollout/mean_turns"] = fmean(rollout.sample.num_turns for rollout in rollouts)
        metrics["rollout/turn_limit_rate"] = fmean(r.sample.finish_reason == "turn_limit" for r in rollouts)
    if rewards:
        metrics["rollout/accuracy"] = fmean(rewards)
    return metrics


def performance_metrics(
    plans: Sequence[BatchPlan],
    *,
    student: Student,
    parallel: Parallel,
    num_response_tokens: int,
    train_s: float,
    step_s: float,
) -> dict[str, float]:
    """How fast the step was and what it took: of `step_s` seconds in all, `train_s` in forward and backward passes.

    `perf/mfu` where the device's peak is known; padding is no work. A collective.
    """
    num_tokens = sum(plan.num_tokens for plan in plans)
    metrics = {
        "time/step_s": step_s,
        "perf/tokens_per_s": num_response_tokens / step_s,
        "perf/peak_mem_gib": parallel.all_max(peak_memory_gib(parallel.device)),
        "perf/packing_efficiency": num_tokens / sum(plan.computed_tokens for plan in plans),
    }
    peak = peak_flops(parallel.device)
    if peak is not None:
        flops = train_flops(student, num_tokens=num_tokens, num_response_tokens=num_response_tokens)
        metrics["perf/mfu"] = flops / (train_s * peak * parallel.size)
    return metrics


def peak_memory_gib(device: torch.device) -> float:
    """The largest so far: the process' resident memory on a CPU, on a GPU what torch has allocated.

    There the sampler's weights and KV cache are left out where it sleeps: they are gone while the student trains. A
    teacher in its own process never counts.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) - pooled_bytes()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
