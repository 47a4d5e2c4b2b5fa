"""The loop: take a batch from the source, update the student, record; now and then validate and save.

Everything it works with is handed in, built by `ranks.build_trainer`. One `step` reads top to bottom; every rank runs
it, each with its share of the sequences, and enters the same collectives in the same order. How sequences come about
is the source's matter (`rollout.source`); timing, the engines' sleep and stop requests are `rollout.stages`'.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from distill_cli.errors import Unrecoverable
from distill_cli.folders.metrics_file import plain
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import BatchPlan, micro_batches
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages, StopRequested
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult, optimizer_step
from distill_cli.train.checkpoints import Checkpoints
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress, Result
from distill_cli.train.step_metrics import performance_metrics, rollout_metrics, train_metrics
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.validation import Validation

log = logging.getLogger(__name__)

TRUNCATED_STEPS = 3
"""Steps in a row above `max_truncated_rate` that are too many."""


@dataclass(frozen=True)
class TrainerSettings:
    """Numbers of the loop; keys of the config have the same names."""

    num_steps: int
    max_grad_norm: float
    max_bad_updates: int
    max_truncated_rate: float
    on_truncation: str
    """`warn` or `stop`."""
    eval_period: int
    """0: no periodic validation."""
    eval_at_start: bool
    eval_at_end: bool


@dataclass
class Trainer:
    """One rank's side of a run."""

    settings: TrainerSettings
    source: RolloutSource
    student: Student
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    parallel: Parallel
    stages: Stages
    progress: Progress
    """Where to go on from."""
    log: RunLog
    rollouts: RolloutsFolder
    validation: Validation | None
    """None if nothing is validated."""
    probes: ProbeReport | None
    """None if eval.record_samples=0."""
    checkpoints: Checkpoints | None
    """None if checkpoint.enabled=false."""

    def run(self) -> Result:
        """Take every step that is left, validate and save as the settings say. A collective."""
        begin = time.perf_counter() - self.progress.seconds
        state, reason, metrics = "finished", None, {}
        try:
            if self.progress.trained_step == 0:
                self.measure_baseline()
            for step in range(self.progress.step + 1, self.settings.num_steps + 1):
                began = time.perf_counter()
                metrics = self.progress.unrecorded or self.step(step)
                self.progress.unrecorded = {name: plain(value) for name, value in metrics.items()}
                if self.validates_at(step):
                    metrics |= self.validate(step)
                if self.probes is not None and (self.validates_at(step) or step == self.settings.num_steps):
                    self.probes.write(step)
                self.log.step(step, metrics | self.stages.lap())
                self.stages.longest_s = max(self.stages.longest_s, time.perf_counter() - began)
                self.progress.step, self.progress.seconds = step, time.perf_counter() - begin
                self.progress.unrecorded = None
                self.check_truncation(metrics["rollout/truncated_rate"])
                if self.saves_at(step):
                    self.save(metrics)
        except StopRequested as request:
            state, reason = "stopped", str(request)
            if self.checkpoints is not None and self.progress.trained_step > self.checkpoints.last_step:
                self.save(metrics)
        if self.checkpoints is not None:
            self.checkpoints.close()
        return self.progress.result(state, reason, seconds=time.perf_counter() - begin)

    def measure_baseline(self) -> None:
        """Measure student and teacher before the first step: step 0 of the metrics. A collective."""
        metrics = self.validate(0) if self.settings.eval_at_start else {}
        self.progress.before = self.progress.latest
        if self.validation is not None and self.validation.teacher is not None:
            self.progress.teacher = self.validation.score_teacher()
            metrics["val/teacher_accuracy"] = self.progress.teacher.accuracy
        if self.probes is not None:
            self.probes.write(0)
        self.log.step(0, metrics | self.stages.lap())

    def step(self, step: int) -> dict[str, float]:
        """Take a step of the run, counted from 1, and return its metrics. A collective."""
        begin = time.perf_counter()
        batch = self.source.step(step)
        if step == 1:
            self.log.example(batch.rollouts[0])
        self.stages.check_stop()  # for the last time: from here on the student changes
        results = []
        for plan in batch.plans:
            with self.stages("pack"):
                batches = micro_batches(plan, batch.rollouts, batch.scores, parallel=self.parallel)
            with self.stages("train"):
                lr = self.schedule.get_last_lr()[0]
                result = optimizer_step(
                    self.student,
                    self.optimizer,
                    self.schedule,
                    batches,
                    max_grad_norm=self.settings.max_grad_norm,
                    parallel=self.parallel,
                )
            self.check_finite(step, result, plan, batch)
            results.append((batches, result))
        with self.stages("record"):
            metrics = {
                "train/lr": lr,
                **train_metrics(results, is_current=batch.is_current, parallel=self.parallel),
                **rollout_metrics(batch.rollouts),
                **batch.metrics,
            }
            return metrics | performance_metrics(
                batch.plans,
                student=self.student,
                parallel=self.parallel,
                num_response_tokens=int(metrics["train/response_tokens"]),
                train_s=self.stages.seconds["train"],
                step_s=time.perf_counter() - begin,
            )

    def validate(self, step: int) -> dict[str, float]:
        """Validate the student, which has learned from `step`, and return its metrics. A collective."""
        if self.validation is None:
            return {}
        self.progress.latest, self.progress.latest_step = self.validation.score_student(), step
        return self.progress.latest.metrics()

    def validates_at(self, step: int) -> bool:
        settings = self.settings
        periodic = settings.eval_period > 0 and step % settings.eval_period == 0
        return periodic or (step == settings.num_steps and settings.eval_at_end)

    def saves_at(self, step: int) -> bool:
        return self.checkpoints is not None and (self.checkpoints.is_due(step) or step == self.settings.num_steps)

    def save(self, metrics: Mapping[str, float]) -> None:
        """Save the last step that the student has learned from. A collective."""
        with self.stages("checkpoint"):
            self.log.flush()
            self.checkpoints.save(self.progress, metrics)

    def check_finite(self, step: int, result: StepResult, plan: BatchPlan, batch: ScoredBatch) -> None:
        """Count updates in a row that were not finite.

        Raises:
            Unrecoverable: they are too many; the rollouts of the last one are in a file.
        """
        if result.is_finite:
            self.progress.bad_updates = 0
            return
        self.progress.bad_updates += 1
        what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
        if self.progress.bad_updates < self.settings.max_bad_updates:
            log.warning("%s; the update is skipped", what)
            return
        file = self.rollouts.write(f"bad_step_{step}.parquet", [batch.rollouts[place] for place in plan.members])
        raise Unrecoverable(f"{what}, {self.progress.bad_updates} updates in a row; the last one's rollouts: {file}")

    def check_truncation(self, truncated_rate: float) -> None:
        """Warn or stop if too many answers reach their limit: a student that stops emitting EOS trains on noise."""
        limit, progress = self.settings.max_truncated_rate, self.progress
        progress.truncated_steps = progress.truncated_steps + 1 if truncated_rate > limit else 0
        if progress.truncated_steps == 0 or progress.truncated_steps % TRUNCATED_STEPS:
            return
        what = (
            f"rollout/truncated_rate is above rollout.max_truncated_rate={limit} for {progress.truncated_steps} steps"
        )
        if self.settings.on_truncation == "stop":
            raise StopRequested(f"{what}; rollout.on_truncation=warn goes on all the same")
        log.warning("%s; compare the two models' end-of-sequence tokens, or raise rollout.max_new_tokens", what)
