"""The loop: sync, sample, score, pack, train, record; now and then validate.

Everything it works with is handed in, built by `worker`. One `step` reads top to bottom; every rank runs it, each with
its share of the sequences, and enters the same collectives in the same order.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean

import torch

from distill_cli.config.schema import Config
from distill_cli.data.prompts import PromptOrder
from distill_cli.data.registry import Verifier
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.engines.settings import SamplingSettings
from distill_cli.evaluate import Score, Validator
from distill_cli.log import StepPrinter
from distill_cli.losses.divergence import token_statistics
from distill_cli.losses.linear_topk import HeadOutput
from distill_cli.parallel.mesh import Parallel
from distill_cli.parallel.sharing import bring_together, share_out
from distill_cli.rollout.collect import judge_rollouts, sample_rollouts, score_rollouts, sequence_seed
from distill_cli.rollout.pack import BatchPlan, MicroBatch, micro_batches, plan_batch
from distill_cli.student.flops import peak_flops, train_flops
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult, optimizer_step
from distill_cli.student.weights import named_parameters
from distill_cli.track.recorder import MetricsFile
from distill_cli.types import Rollout

TOKEN_METRICS = (
    "train/kl_forward",
    "train/kl_reverse",
    "train/entropy",
    "train/teacher_topk_mass",
    "train/student_topk_mass",
    "train/top1_agreement",
)


@dataclass(frozen=True)
class Result:
    """What a finished run comes to."""

    num_steps: int
    seconds: float
    before: Score | None
    after: Score | None
    teacher: Score | None

    @property
    def gap_closed(self) -> float | None:
        """The share of the way from the student's start to the teacher; None where there was no gap to close."""
        if not (self.before and self.after and self.teacher) or self.teacher.accuracy <= self.before.accuracy:
            return None
        return (self.after.accuracy - self.before.accuracy) / (self.teacher.accuracy - self.before.accuracy)


class Stopwatch:
    """Seconds by stage of the current step."""

    def __init__(self, on_stage: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._on_stage = on_stage

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._on_stage(stage)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def lap(self) -> dict[str, float]:
        """`time/<stage>_s` since the last lap."""
        metrics = {f"time/{stage}_s": seconds for stage, seconds in self.seconds.items()}
        self.seconds.clear()
        return metrics


@dataclass
class Trainer:
    """One rank's side of a run."""

    config: Config
    parallel: Parallel
    student: Student
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    sampler: Sampler
    scorer: Scorer
    prompts: PromptOrder
    sampling: SamplingSettings
    verify: Verifier | None
    decode: Callable[[list[int]], str]
    validator: Validator | None
    metrics_file: MetricsFile | None
    """The main rank's."""
    printer: StepPrinter
    num_steps: int
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Stopwatch(self.printer.stage)

    def run(self) -> Result:
        """Every step, with validation before, between and after as the config says. A collective."""
        begin, settings = time.perf_counter(), self.config.eval
        before = self.validate(self.sampler) if settings.at_start else None
        teacher = self.validate(self.scorer) if settings.teacher and self.validator else None
        self.record(0, self.baseline_metrics(before, teacher))
        score = before
        for step in range(1, self.num_steps + 1):
            metrics = self.step(step)
            if self.validates_at(step):
                self.sync(step)
                score = self.validate(self.sampler)
                metrics |= score.metrics()
            metrics |= self.watch.lap()
            self.record(step, metrics)
        after = score if self.validates_at(self.num_steps) else None
        return Result(self.num_steps, time.perf_counter() - begin, before, after, teacher)

    def step(self, step: int) -> dict[str, float]:
        """One step of the run, counted from 1; its metrics."""
        begin = time.perf_counter()
        with self.watch("sync"):
            self.sync(step - 1)
        rollouts = self.sample(step)
        with self.watch("pack"):
            plans = self.plan(rollouts)
        with self.watch("score"):
            self.score(rollouts, plans)
        results = []
        for global_batch, plan in plans:
            with self.watch("pack"):
                batches = micro_batches(plan, global_batch, topk=self.config.loss.topk, parallel=self.parallel)
            with self.watch("train"):
                lr = self.schedule.get_last_lr()[0]
                result = self.train(batches)
            results.append((batches, result))
        with self.watch("record"):
            metrics = {"train/lr": lr, **self.train_metrics(results), **self.rollout_metrics(rollouts)}
            seconds = time.perf_counter() - begin
            num_tokens = sum(plan.num_tokens for _, plan in plans)
            metrics |= {
                "time/step_s": seconds,
                "perf/tokens_per_s": metrics["train/response_tokens"] / seconds,
                "perf/peak_mem_gib": self.parallel.all_max(peak_memory_gib(self.parallel.device)),
                "perf/packing_efficiency": num_tokens / sum(plan.computed_tokens for _, plan in plans),
                **self.mfu(num_tokens=num_tokens, num_response_tokens=int(metrics["train/response_tokens"])),
            }
        return metrics

    def sync(self, version: int) -> None:
        """The student's weights into the sampler's engine, unless it has them. A collective."""
        if version != self.sampler.version:
            self.sampler.sync(named_parameters(self.student), version=version)

    def sample(self, step: int) -> list[Rollout]:
        """The step's sequences, sampled and judged: each by one rank, known to all of them. A collective.

        Whichever rank samples a sequence, it comes out the same: its seed is the sequence's own.
        """
        repeat = self.config.rollout.generations_per_prompt
        prompts = [prompt for prompt in self.prompts.batch(step - 1) for _ in range(repeat)]
        shares = share_out([len(prompt.token_ids) for prompt in prompts], self.parallel.size)
        mine = shares[self.parallel.rank]
        with self.watch("sample"):
            rollouts = sample_rollouts(
                [prompts[number] for number in mine],
                seeds=[sequence_seed(self.config.train.seed, step=step, sequence=number) for number in mine],
                sampler=self.sampler,
                sampling=self.sampling,
            )
            if self.verify is not None:
                judge_rollouts(rollouts, verify=self.verify, decode=self.decode)
            sampled = bring_together([(rollout.sample, rollout.reward) for rollout in rollouts], shares)
        return [Rollout(prompt, *sampled[number]) for number, prompt in enumerate(prompts)]

    def plan(self, rollouts: Sequence[Rollout]) -> list[tuple[Sequence[Rollout], BatchPlan]]:
        """The step's global batches, each the same sequences on any number of ranks, and how each is cut up."""
        train = self.config.train
        batches = [rollouts[i : i + train.global_batch_size] for i in range(0, len(rollouts), train.global_batch_size)]
        return [
            (
                batch,
                plan_batch(
                    [len(rollout.token_ids) for rollout in batch],
                    num_ranks=self.parallel.data_size,
                    max_tokens=train.micro_batch_tokens,
                    packing=train.packing,
                    multiple=self.parallel.length_multiple,
                ),
            )
            for batch in batches
        ]

    def score(self, rollouts: Sequence[Rollout], plans: Sequence[tuple[Sequence[Rollout], BatchPlan]]) -> None:
        """Fills in the teacher's scores of what this rank trains on. A collective.

        The ranks that train on the same sequences share them out, and keep what the others scored.
        """
        mine = [batch[member] for batch, plan in plans for member in plan.members_of(self.parallel.data_rank)]
        peers = self.parallel.peers
        shares = share_out([len(rollout.token_ids) for rollout in mine], peers.size())
        to_score = [mine[index] for index in shares[peers.get_local_rank()]]
        score_rollouts(to_score, scorer=self.scorer)
        scored = bring_together([rollout.scores for rollout in to_score], shares, group=peers.get_group())
        for index, scores in scored.items():
            mine[index].scores = scores

    def train(self, batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step on this rank's part of a global batch. A collective."""
        return optimizer_step(
            self.student,
            self.optimizer,
            self.schedule,
            batches,
            max_grad_norm=self.config.train.max_grad_norm,
            parallel=self.parallel,
        )

    def mfu(self, *, num_tokens: int, num_response_tokens: int) -> dict[str, float]:
        """`perf/mfu` of the step's training, where the device's peak is known; padding is no work."""
        peak = peak_flops(self.parallel.device)
        if peak is None:
            return {}
        flops = train_flops(self.student, num_tokens=num_tokens, num_response_tokens=num_response_tokens)
        return {"perf/mfu": flops / (self.watch.seconds["train"] * peak * self.parallel.size)}

    def validate(self, engine: Sampler | Scorer) -> Score:
        with self.watch("eval"):
            return self.validator.run(engine)

    def validates_at(self, step: int) -> bool:
        settings = self.config.eval
        periodic = settings.period > 0 and step % settings.period == 0
        return periodic or (step == self.num_steps and settings.at_end)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.metrics_file is not None:
            self.metrics_file.write(step, metrics)
        if step > 0 or metrics.keys() & {"val/accuracy"}:
            self.printer.step(step, metrics)

    def baseline_metrics(self, before: Score | None, teacher: Score | None) -> dict[str, float]:
        metrics = before.metrics() if before else {}
        if teacher:
            metrics["val/teacher_accuracy"] = teacher.accuracy
        return metrics | self.watch.lap()

    def train_metrics(self, results: Sequence[tuple[Sequence[MicroBatch], StepResult]]) -> dict[str, float]:
        """Means over the response tokens of the step, of all ranks. A collective."""
        device = self.parallel.device
        sums = torch.zeros(len(TOKEN_METRICS), device=device)
        mismatch = torch.zeros((), device=device)
        for update, (batches, result) in enumerate(results):
            for batch, output in zip(batches, result.outputs, strict=True):
                batch = batch.to(device)
                sums += token_metrics_CN(batch, output).sum(-1)
                if update == 0:  # later ones see a student that has moved on from what was sampled
                    mismatch += (batch.sampler_logp - output.sampled_logp_N).abs().sum()
        *totals, mismatch_total = self.parallel.all_sum(torch.cat([sums, mismatch[None]])).tolist()
        num_tokens = sum(result.num_response_tokens for _, result in results)
        loss = sum(result.loss * result.num_response_tokens for _, result in results)
        return {
            "train/loss": loss / max(num_tokens, 1),
            "train/grad_norm": sum(result.grad_norm for _, result in results) / len(results),
            "train/response_tokens": num_tokens,
            **{name: total / max(num_tokens, 1) for name, total in zip(TOKEN_METRICS, totals, strict=True)},
            "rollout/engine_mismatch": mismatch_total / max(results[0][1].num_response_tokens, 1),
        }

    def rollout_metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Means over the step's sequences, which every rank knows."""
        rewards = [rollout.reward for rollout in rollouts if rollout.reward is not None]
        metrics = {
            "rollout/mean_length": fmean(len(rollout.sample.token_ids) for rollout in rollouts),
            "rollout/truncated_rate": fmean(rollout.sample.finish_reason == "length" for rollout in rollouts),
        }
        if rewards:
            metrics["rollout/accuracy"] = fmean(rewards)
        return metrics


def token_metrics_CN(batch: MicroBatch, output: HeadOutput) -> torch.Tensor:
    """float [C, N]: what is averaged over response tokens, in the order of TOKEN_METRICS."""
    statistics = token_statistics(batch.topk_logp, output.student_logp_NC)
    agreement_N = (output.argmax_N == batch.topk_ids[:, 0]).float()
    values = {**statistics, "entropy": output.entropy_N, "top1_agreement": agreement_N}
    return torch.stack([values[name.removeprefix("train/")] for name in TOKEN_METRICS])


def peak_memory_gib(device: torch.device) -> float:
    """The largest so far: the allocator's on a GPU, the process' resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
