"""The loop: take a batch from the source, update the student, record; validate and save when due.

`ranks.build_trainer` builds the parts and passes them in. Every rank runs each `step` with its share of the sequences,
and enters the same collectives in the same order. `rollout.source` makes the sequences; `rollout.stages` times the
stages, puts engines to sleep and checks for stop requests.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from distill_cli.checkpoint.saver import Saver, Trainable
from distill_cli.config.derived import max_engine_mismatch
from distill_cli.config.schema import Config, Dtype, OnTruncation
from distill_cli.config.teachers import ONLY
from distill_cli.errors import Unrecoverable
from distill_cli.folders.attempts import Outcome
from distill_cli.folders.metrics_file import plain
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.rollout.length_guard import LengthGuard
from distill_cli.rollout.pack import BatchPlan, micro_batches
from distill_cli.rollout.remote import SamplingRanks
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages, StopRequested
from distill_cli.student.model import Student
from distill_cli.student.moving import MovingCopy
from distill_cli.student.optimizer import StepResult, optimizer_step, term_norms
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.step_metrics import (
    alignment_metrics,
    performance_metrics,
    rollout_metrics,
    signal_metrics,
    teacher_metrics,
    train_metrics,
)
from distill_cli.train.token_report import ProbeReport
from distill_cli.train.validation import Validation
from distill_cli.types import Rollout

log = logging.getLogger(__name__)

TRUNCATED_STEPS = 3
"""Warn or stop after so many steps in a row above `rollout.max_truncated_rate`; warn again when they double."""
RANKED = ("train", "rollout", "val", "teacher")
"""Kinds of metrics that a checkpoint keeps: checkpoints can be ranked by them."""


@dataclass
class Trainer:
    """One rank's side of a run."""

    config: Config
    num_steps: int
    source: RolloutSource
    student: Student
    trainable: Trainable
    """The student's optimizer and schedule."""
    stages: Stages
    progress: Progress
    """The state to continue from."""
    log: RunLog
    rollouts: RolloutsFolder
    validation: Validation | None
    """None if nothing is validated."""
    probes: ProbeReport | None
    """None if eval.record_samples=0."""
    saver: Saver | None
    """None if checkpoint.enabled=false."""
    data_fingerprint: str | None
    """Identifies the training data, whose order a resumed run relies on; None if unknown."""
    teachers: Sequence[str] = (ONLY,)
    """The teachers' names, in the config's order."""
    advantages: Callable[[Sequence[Rollout], Sequence[int]], Mapping[int, torch.Tensor]] | None = None
    """Returns the advantages of an update's sequences (`rollout.advantages`); None if there are none."""
    guard: LengthGuard | None = None
    """The source's; None if rollout.guard_above=null."""
    copies: Sequence[MovingCopy] = ()
    """The weights of teachers that follow the student."""
    sampling_ranks: SamplingRanks | None = None
    """The ranks that sample, if those that train do not (`cluster.roles`)."""

    def run(self) -> Outcome:
        """Take every remaining step; validate and save as the config says. A collective."""
        begin = time.perf_counter() - self.progress.seconds
        state, reason = "finished", None
        metrics: dict[str, float] = {}
        try:
            if self.progress.trained_step == 0:
                self.measure_baseline()
            for step in range(self.progress.step + 1, self.num_steps + 1):
                began = time.perf_counter()
                metrics = self.progress.unrecorded or self.step(step)
                self.progress.unrecorded = {name: plain(value) for name, value in metrics.items()}
                if self.validates_at(step):
                    metrics |= self.validate(step)
                if self.probes is not None and (self.validates_at(step) or step == self.num_steps):
                    metrics |= self.probes.write(step)
                self.log.step(step, metrics | self.stages.lap())
                self.stages.longest_s = max(self.stages.longest_s, time.perf_counter() - began)
                self.progress.step, self.progress.seconds = step, time.perf_counter() - begin
                self.progress.unrecorded = None
                if "rollout/truncated_rate" in metrics and self.has_full_length(step):
                    self.observe_lengths(metrics["rollout/truncated_rate"])
                    self.check_truncation(metrics["rollout/truncated_rate"])
                if step % self.config.checkpoint.period == 0 or step == self.num_steps:
                    self.save(metrics)
        except StopRequested as request:
            state, reason = "failed" if request.is_failure else "stopped", str(request)
            self.save(metrics)
        if self.saver is not None:
            self.saver.close()
        return self.progress.outcome(state, reason, seconds=time.perf_counter() - begin)

    def measure_baseline(self) -> None:
        """Measure student and teacher before the first step: step 0 of the metrics. A collective."""
        metrics = self.validate(0) if self.config.eval.at_start else {}
        self.progress.before = self.progress.latest
        if self.validation is not None and self.validation.teachers:
            self.progress.teacher, each = self.validation.score_teachers()
            metrics["val/teacher_accuracy"] = self.progress.teacher.accuracy
            if len(self.teachers) > 1:
                names = zip(self.teachers, each, strict=True)
                metrics |= {f"teacher/{name}/val_accuracy": one.accuracy for name, one in names if one.num_samples}
        if self.probes is not None:
            metrics |= self.probes.write(0)
        self.log.step(0, metrics | self.stages.lap())

    def step(self, step: int) -> dict[str, float]:
        """Take a step of the run, counted from 1, and return its metrics. A collective."""
        begin = time.perf_counter()
        optimizer, schedule, mesh = self.trainable.optimizer, self.trainable.schedule, self.stages.parallel
        batch = self.source.step(step)
        if step == 1:
            self.log.example(batch.rollouts[0])
        self.stages.check_stop()  # the step's last check: from here on the student changes
        self.source.commit()
        updates, of_terms = [], dict[str, float]()
        for plan in batch.plans:
            with self.stages("pack"):
                by_place = None if self.advantages is None else self.advantages(batch.rollouts, plan.members)
                batches = micro_batches(plan, batch.rollouts, batch.scores, parallel=mesh, advantages=by_place)
            if plan is batch.plans[0] and self.measures_terms_at(step):
                with self.stages("record"):
                    of_terms = term_norms(self.student, optimizer, batches, parallel=mesh)
            with self.stages("train"):
                lr, norm = float(schedule.get_last_lr()[0]), self.config.train.max_grad_norm
                result = optimizer_step(self.student, optimizer, schedule, batches, max_grad_norm=norm, parallel=mesh)
            self.check_finite(step, result, plan, batch)
            updates.append((batches, result))
        for copy in self.copies:
            copy.follow(step)
        with self.stages("record"):
            train_s = self.stages.seconds["train"]
            trained = train_metrics(updates, is_current=batch.is_current, parallel=mesh)
            trained |= {f"train/grad_norm_{term}": norm for term, norm in of_terms.items()}
            trained |= signal_metrics(updates, self.student, parallel=mesh)
            trained |= alignment_metrics(updates, batch.rollouts, self.student.groups, parallel=mesh)
            if len(self.teachers) > 1:
                trained |= teacher_metrics(updates, batch.rollouts, names=self.teachers, parallel=mesh)
            self.check_mismatch(step, trained.get("rollout/engine_mismatch", 0.0))
            return {
                "train/lr": lr,
                **trained,
                **rollout_metrics(batch.rollouts),
                **batch.metrics,
                **performance_metrics(batch.plans, updates, self.student, mesh, train_s=train_s, begin=begin),
            }

    def validate(self, step: int) -> dict[str, float]:
        """Validate the student, which has learned from `step`, and return its metrics. A collective."""
        if self.validation is None:
            return {}
        self.progress.latest, self.progress.latest_step = self.validation.score_student(), step
        return self.progress.latest.metrics()

    def validates_at(self, step: int) -> bool:
        """Return whether the student is validated after `step`."""
        settings = self.config.eval
        return (settings.period > 0 and step % settings.period == 0) or (step == self.num_steps and settings.at_end)

    def has_full_length(self, step: int) -> bool:
        """Return whether answers that `step` sampled may have the greatest length of the run."""
        rollout = self.config.rollout
        return rollout.max_new_tokens_at(step) == rollout.longest_answer

    def measures_terms_at(self, step: int) -> bool:
        """Return whether the gradients of the loss's terms are compared in `step`, which costs two passes more."""
        has_both = self.advantages is not None and any(
            one.divergence_weight or one.policy_gradient or one.likelihood for one in self.student.objectives
        )
        return has_both and (step == 1 or self.validates_at(step))

    def save(self, metrics: Mapping[str, float]) -> None:
        """Save the last step that the student has learned from, unless it is saved. A collective.

        Args:
            metrics: that step's.
        """
        progress, settings = self.progress, self.config.checkpoint
        if self.saver is None or progress.trained_step <= self.saver.last_step:
            return
        with self.stages("checkpoint"):
            self.log.flush()
            ranked = {name: plain(value) for name, value in metrics.items() if name.startswith(RANKED)}
            progress.note(settings.metric, ranked.get(settings.metric), higher_is_better=settings.keeps_highest)
            state = {**asdict(progress), "metrics": ranked, "data": self.data_fingerprint}
            self.saver.save(progress.trained_step, state, in_flight=self.source.state)

    def check_finite(self, step: int, result: StepResult, plan: BatchPlan, batch: ScoredBatch) -> None:
        """Count consecutive updates that were skipped because loss or gradient was not finite.

        Raises:
            Unrecoverable: there are train.max_bad_updates of them; the last one's rollouts are in a file.
        """
        self.progress.bad_updates = 0 if result.is_finite else self.progress.bad_updates + 1
        if result.is_finite:
            return
        problem = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
        if self.progress.bad_updates < self.config.train.max_bad_updates:
            log.warning("%s; the update is skipped", problem)
            return
        file = self.rollouts.write(f"bad_step_{step}.parquet", [batch.rollouts[place] for place in plan.members])
        raise Unrecoverable(f"{problem}, {self.progress.bad_updates} updates in a row; the last one's rollouts: {file}")

    def check_mismatch(self, step: int, mismatch: float) -> None:
        """Raise Unrecoverable if sampler and trainer disagree on the sampled tokens' log-probabilities."""
        limit = max_engine_mismatch(self.config)
        if not mismatch > limit:  # `check_finite` counts a NaN
            return
        what = f"step {step}: sampler and trainer differ by {mismatch:.2g} nats a token (rollout/engine_mismatch)"
        fix = "run `distill check` to see where"
        if self.config.model.student.dtype is not Dtype.float32:
            fix += "; if it is rounding, sample with model.student.dtype=float32"
        fix += "; raise rollout.max_engine_mismatch if such a difference is expected"
        raise Unrecoverable(f"{what}, and the limit is {limit:g}: the sampler writes another model's answers; {fix}")

    def observe_lengths(self, truncated_rate: float) -> None:
        """Update the length guard after a step, and log when it sets in and when it ends."""
        if (guard := self.guard) is None:
            return
        was_on = guard.share > 0
        guard.observe(truncated_rate)
        self.progress.guard_left = guard.left
        if guard.share > 0 and not was_on:
            rate = f"{truncated_rate:.0%} of answers reach the length limit, rollout.guard_above={guard.above:g}"
            log.warning("%s: the teacher writes %.0f%% of the next step's answers", rate, 100 * guard.share)
        elif was_on and guard.share == 0:
            log.warning("%.0f%% of answers reach the length limit: the student writes all again", 100 * truncated_rate)

    def check_truncation(self, truncated_rate: float) -> None:
        """Warn or stop if too many answers reach the length limit: a student that stops emitting EOS trains on noise.

        Raises:
            StopRequested: too many do, and rollout.on_truncation=stop.
        """
        limit, progress = self.config.rollout.max_truncated_rate, self.progress
        progress.truncated_steps = progress.truncated_steps + 1 if truncated_rate > limit else 0
        times, left = divmod(progress.truncated_steps, TRUNCATED_STEPS)
        if left or times.bit_count() != 1:  # after 3, 6, 12, 24, ... steps
            return
        steps = f"{progress.truncated_steps} steps in a row"
        problem = f"rollout/truncated_rate is above rollout.max_truncated_rate={limit} for {steps}"
        if self.config.rollout.on_truncation is OnTruncation.stop:
            raise StopRequested(f"{problem}; set rollout.on_truncation=warn to continue anyway")
        log.warning("%s; compare the two models' end-of-sequence tokens, or raise rollout.max_new_tokens", problem)
