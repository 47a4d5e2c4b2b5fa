"""Compute a step's metrics, its row in metrics.jsonl, from the step's batch and updates.

Shape letters: N response tokens of a micro-batch, C metrics that are averaged over them.
"""

import resource
import time
from collections.abc import Iterable, Sequence
from dataclasses import fields
from statistics import fmean

import torch

from distill_cli.engines.vllm_patches import pooled_bytes
from distill_cli.losses.linear_divergence import HeadOutput
from distill_cli.metrics import BY_TEACHER, METRICS, Tokens
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import BatchPlan, MicroBatch
from distill_cli.student.flops import peak_flops, train_flops
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult
from distill_cli.types import Rollout

TOKEN_METRICS = {metric.name: metric.formula for metric in METRICS if metric.formula is not None}
"""Formulas by name of the metrics that are averaged over response tokens."""

Updates = Sequence[tuple[Sequence[MicroBatch], StepResult]]
"""A step's updates: this rank's micro-batches of each, and its result."""


def train_metrics(updates: Updates, *, is_current: bool, parallel: Parallel) -> dict[str, float]:
    """Return means over the response tokens of a step's updates on all ranks. A collective.

    Args:
        is_current: the batch's. Log-probabilities of sampler and trainer differ by `rollout/engine_mismatch` if both
            have the same weights, and by `rollout/drift` if not.
    """
    sums = torch.zeros(len(TOKEN_METRICS) + 2, device=parallel.device)
    for number, (batches, result) in enumerate(updates):
        for batch, output in zip(batches, result.outputs, strict=True):
            batch = batch.to(parallel.device)
            sums[:-2] += token_metrics_CN(output).sum(-1)
            if number == 0:  # the student of later updates is not the one that sampled
                known = batch.has_sampler_logp
                sums[-2] += (batch.sampler_logp - output.sampled_logp_N)[known].abs().sum()
                sums[-1] += known.sum()
    *totals, mismatch, num_sampled = parallel.all_sum(sums).tolist()
    num_tokens = sum(result.num_response_tokens for _, result in updates)
    loss = sum(result.loss * result.num_response_tokens for _, result in updates)
    difference = "rollout/engine_mismatch" if is_current else "rollout/drift"
    return {
        "train/loss": loss / max(num_tokens, 1),
        "train/grad_norm": sum(result.grad_norm for _, result in updates) / len(updates),
        "train/response_tokens": num_tokens,
        "train/skipped_updates": sum(not result.is_finite for _, result in updates),
        **{name: total / max(num_tokens, 1) for name, total in zip(TOKEN_METRICS, totals, strict=True)},
        **({difference: mismatch / num_sampled} if num_sampled else {}),
    }


def alignment_metrics(
    updates: Updates, rollouts: Sequence[Rollout], indices: Iterable[int], *, parallel: Parallel
) -> dict[str, float]:
    """Return how the student's tokens fit those of teachers with other ones; empty without any. A collective.

    Args:
        rollouts: all of the step.
        indices: those of the run's teachers that have other tokens.
    """
    own = [1 << index for index in indices]
    num_written = sum(rollout.sample.num_trained for rollout in rollouts if rollout.prompt.teachers in own)
    if not num_written:
        return {}
    sums = torch.zeros(3, device=parallel.device)
    for batches, result in updates:
        for batch, output in zip(batches, result.outputs, strict=True):
            batch = batch.to(parallel.device)
            is_own_N = torch.isin(batch.teachers, batch.teachers.new_tensor(own))
            sums[0] += is_own_N.sum()
            if batch.scores.alignment.shape[1]:
                sums[1:] += batch.scores.alignment[is_own_N].sum(0)
            sums[-1] += output.residue_N[is_own_N].sum()
    number, aligned, residue = parallel.all_sum(sums).tolist()
    return {
        "train/aligned_rate": aligned / max(number, 1),
        "train/residual_mass": residue / max(number, 1),
        "train/left_out_rate": 1 - number / max(num_written, 1),
    }


def signal_metrics(updates: Updates, student: Student, *, parallel: Parallel) -> dict[str, float]:
    """Return what token weights, the clip and the limit of importance ratios leave: shares of a step. A collective.

    Empty if the loss has none of them.
    """
    objectives = student.objectives
    has_weight, has_clip = (any(getattr(one, name) is not None for one in objectives) for name in ("weight", "clip"))
    has_ratio = student.has_advantages or any(one.policy_gradient for one in objectives)
    if not (has_weight or has_clip or has_ratio):
        return {}
    sums = torch.zeros(8, device=parallel.device)
    for batches, result in updates:
        for batch, output in zip(batches, result.outputs, strict=True):
            batch = batch.to(parallel.device)
            divergence_N, weight_N = output.divergence_N, output.weight_N
            clip_N, ratio_N = student.limits_of(batch)
            clipped_N = torch.minimum(divergence_N, clip_N)
            log_ratio_N = (output.sampled_logp_N - batch.sampler_logp).abs()
            is_sampled_N = batch.has_sampler_logp
            sums += torch.stack(
                [
                    torch.tensor(float(len(divergence_N)), device=parallel.device),
                    (weight_N > 0).sum(),
                    (divergence_N <= clip_N).sum(),
                    divergence_N.sum(),
                    clipped_N.sum(),
                    (weight_N * clipped_N).sum(),
                    is_sampled_N.sum(),
                    (is_sampled_N & (log_ratio_N <= ratio_N.log())).sum(),
                ]
            )
    number, weighted, below, whole, clipped, left, sampled, near = parallel.all_sum(sums).tolist()
    metrics = dict[str, float]()
    if has_weight:
        metrics |= {"train/weighted_tokens": weighted / max(number, 1), "train/weighted_loss": share(left, clipped)}
    if has_clip:
        metrics |= {"train/unclipped_tokens": below / max(number, 1), "train/unclipped_loss": share(clipped, whole)}
    if has_ratio:
        metrics["train/near_tokens"] = near / max(sampled, 1)
    return metrics


def share(part: float, whole: float) -> float:
    """Return the share that a part has of the whole, 1 of nothing."""
    return part / whole if whole > 0 else 1.0


def teacher_metrics(
    updates: Updates, rollouts: Sequence[Rollout], *, names: Sequence[str], parallel: Parallel
) -> dict[str, float]:
    """Return `teacher/<name>/...`: means over the response tokens of each teacher, or mixture of them. A collective.

    Args:
        rollouts: all of the step.
        names: the teachers', by index.
    """
    kinds = sorted({rollout.prompt.teachers for rollout in rollouts})
    columns = [f"train/{name}" for name in BY_TEACHER]
    sums = torch.zeros(len(kinds), len(columns) + 1, device=parallel.device)
    for batches, result in updates:
        for batch, output in zip(batches, result.outputs, strict=True):
            batch = batch.to(parallel.device)
            values_CN = dict(zip(TOKEN_METRICS, token_metrics_CN(output), strict=True))
            values_CN["train/loss"] = output.loss_N * result.num_response_tokens
            rows_NC = torch.stack([*(values_CN[name] for name in columns), torch.ones_like(output.loss_N)], dim=1)
            place_N = torch.searchsorted(torch.tensor(kinds, device=parallel.device), batch.teachers)
            sums.index_add_(0, place_N, rows_NC)
    totals = parallel.all_sum(sums).tolist()
    num_tokens, metrics = sum(row[-1] for row in totals), dict[str, float]()
    for kind, (*values, number) in zip(kinds, totals, strict=True):
        at = f"teacher/{label(kind, names)}"
        means = {name.partition("/")[2]: value / max(number, 1) for name, value in zip(columns, values, strict=True)}
        metrics |= {f"{at}/{name}": value for name, value in means.items()}
        metrics[f"{at}/token_share"] = number / max(num_tokens, 1)
        own = (rollout for rollout in rollouts if rollout.prompt.teachers == kind)
        rewards = [one.reward for one in own if one.reward is not None and one.sample.source == "student"]
        if rewards:
            metrics[f"{at}/rollout_accuracy"] = fmean(rewards)
    return metrics


def label(teachers: int, names: Sequence[str]) -> str:
    """Return the name of a set of teachers (`Prompt.teachers`), such as `math` or `math+code`."""
    return "+".join(name for index, name in enumerate(names) if teachers >> index & 1)


def token_metrics_CN(output: HeadOutput) -> torch.Tensor:
    """Return each of TOKEN_METRICS at each response token: float [C, N]."""
    tokens = Tokens(**{field.name: getattr(output, field.name) for field in fields(Tokens)})
    return torch.stack([formula(tokens) for formula in TOKEN_METRICS.values()])


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return means over the sequences that ended in the step, which every rank knows: the student's own, or all if
    there are none. Empty if none ended."""
    own = [rollout for rollout in rollouts if rollout.sample.source == "student"]
    share, rollouts = len(own) / len(rollouts), own or rollouts
    rollouts = [rollout for rollout in rollouts if rollout.sample.finish_reason]
    if not rollouts:
        return {}
    samples = [rollout.answer for rollout in rollouts]
    rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
    metrics = {
        "rollout/mean_length": fmean(len(sample.written_ids) for sample in samples),
        "rollout/truncated_rate": fmean(sample.finish_reason == "length" for sample in samples),
    }
    if share < 1:
        metrics["rollout/on_policy_fraction"] = share
    if any(sample.trained is not None for sample in samples):  # there is an environment
        metrics["rollout/mean_turns"] = fmean(sample.num_turns for sample in samples)
        metrics["rollout/turn_limit_rate"] = fmean(sample.finish_reason == "turn_limit" for sample in samples)
    if rewards:
        metrics["rollout/accuracy"] = fmean(rewards)
    return metrics


def performance_metrics(
    plans: Sequence[BatchPlan], updates: Updates, student: Student, parallel: Parallel, *, train_s: float, begin: float
) -> dict[str, float]:
    """Return the speed and memory of a step; `perf/mfu` if the device's peak is known. A collective.

    Padding does not count as work.

    Args:
        train_s: seconds of forward and backward passes.
        begin: `time.perf_counter()` at the beginning of the step.
    """
    step_s = time.perf_counter() - begin
    num_tokens = sum(plan.num_tokens for plan in plans)
    num_response_tokens = sum(result.num_response_tokens for _, result in updates)
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
    """Return the peak so far: resident memory of the process on a CPU, memory allocated by torch on a GPU.

    A GPU's peak excludes the weights and KV cache of a sampler that sleeps while the student trains, and always a
    teacher in its own process.
    """
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) - pooled_bytes()) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
