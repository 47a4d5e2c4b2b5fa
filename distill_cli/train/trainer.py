"""The loop: sync, sample, score, pack, train, record; now and then validate and save a checkpoint.

Everything it works with is handed in, built by `build`. One `step` reads top to bottom; every rank runs it, each with
its share of the sequences, and enters the same collectives in the same order.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from distill_cli.checkpoint.saver import Saver
from distill_cli.config.schema import Config, OnTruncation
from distill_cli.data.order import PromptOrder, PromptStream
from distill_cli.engines.companion import CompanionScorer
from distill_cli.engines.sampler import Sampler
from distill_cli.engines.scorer import Scorer
from distill_cli.errors import Unrecoverable
from distill_cli.folders.metrics_file import MetricsFile, plain
from distill_cli.folders.rollouts_table import write_rollouts
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel
from distill_cli.rollout.pack import MicroBatch, Plans, micro_batches, plan_batch
from distill_cli.rollout.score_files import Recorder, Replay
from distill_cli.student.model import Student
from distill_cli.student.optimizer import StepResult, optimizer_step
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.train.rollout_worker import EnginePair
from distill_cli.train.run_state import Progress, Result, StopRequested, Stopwatch
from distill_cli.train.step_metrics import performance_metrics, rollout_metrics, train_metrics
from distill_cli.train.token_report import Watched, view_tokens
from distill_cli.train.validation import Score, Validator
from distill_cli.types import Prompt, Rollout

log = logging.getLogger(__name__)

TRUNCATED_STEPS = 3
"""Steps in a row above rollout.max_truncated_rate that are too many."""


@dataclass
class Trainer:
    """One rank's side of a run."""

    config: Config
    parallel: Parallel
    student: Student
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    engines: EnginePair
    prompts: PromptOrder | PromptStream | Replay
    validator: Validator | None
    metrics_file: MetricsFile | None
    """The main rank's."""
    printer: StepPrinter
    num_steps: int
    saver: Saver | None
    """None where checkpoint.enabled is false."""
    rollouts_dir: Path
    """Where rollouts are left for a look at them."""
    recorder: Recorder | None = None
    """Keeps the scores of each step; None where they are not kept."""
    watched: Watched | None = None
    """Prompts whose answers are; None where eval.record_samples is 0."""
    show: Callable[[list[int]], str] | None = None
    """Text of token ids, special tokens too, for the one sequence that is printed; None prints none."""
    stop: StopFlag = field(default_factory=StopFlag)
    heartbeat: Callable[[str], object] = lambda stage: None
    """Called as each stage of a step begins."""
    progress: Progress = field(default_factory=Progress)
    """Where to go on from."""
    longest_s: float = 0.0
    """The longest step so far, with its validation: what another one may take."""
    watch: Stopwatch = field(init=False)

    def __post_init__(self) -> None:
        def on_stage(stage: str) -> None:
            self.heartbeat(f"{stage} {self.num_steps}")
            self.printer.stage(stage)

        self.watch = Stopwatch(on_stage)

    def run(self) -> Result:
        """Every step that is not done yet, with validation and checkpoints as the config says. A collective."""
        begin = time.perf_counter() - self.progress.seconds
        state, reason, metrics = "finished", None, {}
        try:
            if self.progress.trained_step == 0:
                self.measure_baseline()
            for step in range(self.progress.step + 1, self.num_steps + 1):
                began = time.perf_counter()
                metrics = self.progress.unrecorded or self.step(step)
                self.progress.unrecorded = {name: plain(value) for name, value in metrics.items()}
                if self.validates_at(step):
                    metrics |= self.validate_student(step)
                if self.validates_at(step) or step == self.num_steps:
                    self.record_samples(step)
                metrics |= self.watch.lap()
                self.record(step, metrics)
                self.longest_s = max(self.longest_s, time.perf_counter() - began)
                self.progress.step, self.progress.seconds = step, time.perf_counter() - begin
                self.progress.unrecorded = None
                self.mind_truncation(metrics)
                if self.saves_at(step):
                    self.save(metrics)
        except StopRequested as request:
            state, reason = "stopped", str(request)
            if self.saver is not None and self.progress.trained_step > self.saver.last_step:
                self.save(metrics)
        if self.saver is not None:
            self.saver.close()
        return self.result(state, reason, seconds=time.perf_counter() - begin)

    def measure_baseline(self) -> None:
        """Student and teacher before the first step: step 0 of the metrics. A collective."""
        settings, progress = self.config.eval, self.progress
        metrics = self.validate_student(0) if settings.at_start else {}
        progress.before = progress.latest
        if settings.teacher and self.validator:
            with self.awake(self.engines.scorer):
                progress.teacher = self.validate(self.engines.scorer)
            metrics["val/teacher_accuracy"] = progress.teacher.accuracy
        self.record_samples(0)
        self.record(0, metrics | self.watch.lap())

    def step(self, step: int) -> dict[str, float]:
        """One step of the run, counted from 1; its metrics."""
        begin = time.perf_counter()
        rollouts, plans = self.replayed(step) if isinstance(self.prompts, Replay) else self.answered(step)
        self.heed_stop()  # the last time: from here on the step's updates change the student
        results = []
        for global_batch, plan in plans:
            with self.watch("pack"):
                batches = micro_batches(plan, global_batch, topk=self.config.loss.topk, parallel=self.parallel)
            with self.watch("train"):
                lr = self.schedule.get_last_lr()[0]
                result = self.train(batches)
            self.mind_bad_update(step, result, global_batch)
            results.append((batches, result))
        with self.watch("record"):
            metrics = {"train/lr": lr, **train_metrics(results, parallel=self.parallel), **rollout_metrics(rollouts)}
            if not isinstance(self.prompts, Replay):
                metrics |= self.engines.failed()
            elif "rollout/engine_mismatch" in metrics:
                metrics["rollout/drift"] = metrics.pop("rollout/engine_mismatch")  # no engine's fault
            metrics |= performance_metrics(
                [plan for _, plan in plans],
                student=self.student,
                parallel=self.parallel,
                num_response_tokens=int(metrics["train/response_tokens"]),
                train_s=self.watch.seconds["train"],
                step_s=time.perf_counter() - begin,
            )
        return metrics

    def answered(self, step: int) -> tuple[list[Rollout], Plans]:
        """The step's sequences, sampled and scored, and how they are cut up. A collective."""
        with self.awake(self.engines.sampler):
            with self.watch("sync"):
                self.engines.sync(step - 1)
            self.heed_stop(within_s=self.longest_s)
            with self.watch("sample"):
                rollouts = self.engines.sample(self.prompts_of(step), step=step)
        if step == 1 and self.show is not None:
            self.printer.example(example_parts(rollouts[0], self.show))
        self.heed_stop()
        if any(rollout.sample.source == "teacher" for rollout in rollouts):
            with self.awake(self.engines.scorer), self.watch("sample"):
                self.engines.ask_teacher(rollouts, step=step)
        with self.watch("pack"):
            plans = self.plan(rollouts)
        with self.awake(self.engines.scorer), self.watch("score"):
            self.engines.score(plans)
        if self.recorder is not None and not self.parallel.all_max(float(self.stop.is_set())):
            with self.watch("record"):  # an engine that was asked to stop has not scored all
                self.recorder.keep(step, rollouts, self.places_of(plans))
        return rollouts, plans

    def prompts_of(self, step: int) -> list[Prompt]:
        """One for each of the step's sequences."""
        return [p for p in self.prompts.batch(step - 1) for _ in range(self.config.rollout.generations_per_prompt)]

    def replayed(self, step: int) -> tuple[list[Rollout], Plans]:
        """The same of a recorded step. A collective."""
        self.heed_stop(within_s=self.longest_s)
        with self.watch("read"):
            rollouts = self.prompts.rollouts(step - 1)
            plans = self.plan(rollouts)
            self.prompts.fill_in(step - 1, rollouts, self.places_of(plans))
        if step == 1 and self.show is not None:
            self.printer.example(example_parts(rollouts[0], self.show))
        return rollouts, plans

    def places_of(self, plans: Plans) -> list[int]:
        """The step's sequences that this rank trains on, by their place in it."""
        size, mine = self.config.train.global_batch_size, self.parallel.data_rank
        return [size * number + member for number, (_, plan) in enumerate(plans) for member in plan.members_of(mine)]

    @contextmanager
    def awake(self, engine: Sampler | Scorer | CompanionScorer) -> Iterator[None]:
        """The device's memory is `engine`'s within, and given back after, where `engine.<role>.sleep` says so."""
        if self.parallel.device.type == "cuda":
            torch.cuda.empty_cache()  # an engine cannot take what torch keeps for the next training step
        with self.watch("wake"):
            engine.wake()
        try:
            yield
        finally:  # a stop leaves it too, and the checkpoint that follows needs the memory
            with self.watch("wake"):
                engine.sleep()

    def plan(self, rollouts: Sequence[Rollout]) -> Plans:
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

    def validate(self, engine: Sampler | Scorer | CompanionScorer) -> Score:
        with self.watch("eval"):
            return self.validator.run(engine, as_teacher=engine is self.engines.scorer)

    def validate_student(self, step: int) -> dict[str, float]:
        """The student as it is after `step`; its metrics. A collective."""
        if self.validator is None:
            return {}
        with self.awake(self.engines.sampler):
            self.engines.sync(step)
            score = self.validate(self.engines.sampler)
        self.heed_stop()  # the score is not whole where an engine was
        self.progress.latest, self.progress.latest_step = score, step
        return self.progress.latest.metrics()

    def record_samples(self, step: int) -> None:
        """What both models say at every token of the watched prompts' answers, as the student is after `step`.

        The seeds are those of step 0 each time: what differs is the student. A collective.
        """
        if self.watched is None:
            return
        with self.awake(self.engines.sampler), self.watch("record"):
            self.engines.sync(step)
            rollouts = self.engines.answer(self.watched.prompts, step=0)
        self.heed_stop()
        plans = self.plan(rollouts)
        with self.awake(self.engines.scorer), self.watch("record"):
            self.engines.score(plans)
        self.heed_stop()
        with self.watch("record"):
            for batch, plan in plans:
                batches = micro_batches(plan, batch, topk=self.config.loss.topk, parallel=self.parallel)
                view_tokens(batches, batch, student=self.student, parallel=self.parallel)
            self.keep(self.rollouts_dir / f"step_{step}.parquet", rollouts, token_text=self.watched.token_text)

    def validates_at(self, step: int) -> bool:
        settings = self.config.eval
        periodic = settings.period > 0 and step % settings.period == 0
        return periodic or (step == self.num_steps and settings.at_end)

    def saves_at(self, step: int) -> bool:
        periodic = step % self.config.checkpoint.period == 0
        return self.saver is not None and (periodic or step == self.num_steps)

    def save(self, metrics: Mapping[str, float]) -> None:
        """A checkpoint of the last step that the student has learned from. A collective."""
        settings, progress = self.config.checkpoint, self.progress
        ranked = {name: plain(value) for name, value in metrics.items() if name.startswith(("train", "rollout", "val"))}
        progress.note(settings.metric, ranked.get(settings.metric), higher_is_better=settings.higher_is_better)
        state = {**asdict(progress), "metrics": ranked, "data": self.prompts.fingerprint}
        with self.watch("checkpoint"):
            if self.metrics_file is not None:
                with suppress(OSError):  # warned of when its rows were written
                    self.metrics_file.flush()
            self.saver.save(progress.trained_step, state)

    def heed_stop(self, *, within_s: float = 0.0) -> None:
        """Ends the run where any rank was asked to, or is to be done in `within_s` from now.

        A collective: they end together, after the same step.
        """
        if self.parallel.all_max(float(self.stop.is_set(within_s=within_s))):
            raise StopRequested(self.stop.reason)

    def mind_truncation(self, metrics: Mapping[str, float]) -> None:
        """A student that has lost its way of ending writes until it is cut off, and learns from noise."""
        rollout, progress = self.config.rollout, self.progress
        too_many = metrics["rollout/truncated_rate"] > rollout.max_truncated_rate
        progress.truncated_steps = progress.truncated_steps + 1 if too_many else 0
        if progress.truncated_steps == 0 or progress.truncated_steps % TRUNCATED_STEPS:
            return
        what = (
            f"rollout/truncated_rate is above rollout.max_truncated_rate={rollout.max_truncated_rate} for "
            f"{progress.truncated_steps} steps"
        )
        if rollout.on_truncation is OnTruncation.stop:
            raise StopRequested(f"{what}; rollout.on_truncation=warn goes on all the same")
        log.warning("%s; compare the two models' end-of-sequence tokens, or raise rollout.max_new_tokens", what)

    def mind_bad_update(self, step: int, result: StepResult, rollouts: Sequence[Rollout]) -> None:
        """Counts updates in a row that were not finite.

        Raises:
            Unrecoverable: too many; their last rollouts are in a file.
        """
        if result.is_finite:
            self.progress.bad_updates = 0
            return
        self.progress.bad_updates += 1
        what = f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite"
        if self.progress.bad_updates < self.config.train.max_bad_updates:
            log.warning("%s; the update is skipped", what)
            return
        file = self.rollouts_dir / f"bad_step_{step}.parquet"
        self.keep(file, rollouts)
        raise Unrecoverable(f"{what}, {self.progress.bad_updates} updates in a row; the last one's rollouts: {file}")

    def keep(self, file: Path, rollouts: Sequence[Rollout], **settings: Any) -> None:
        """Writes rollouts for a look at them; on a full disk a warning is all that comes of it."""
        if not self.parallel.is_main:
            return
        try:
            write_rollouts(file, rollouts, decode=self.engines.decode, **settings)
        except OSError as error:
            log.warning("%s is not written: %s", file, error.strerror or error)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        if self.metrics_file is not None:
            self.metrics_file.write(step, metrics)
        if step > 0 or metrics.keys() & {"val/accuracy"}:
            self.printer.step(step, metrics)

    def result(self, state: str, reason: str | None, *, seconds: float) -> Result:
        progress = self.progress
        after = progress.latest if progress.latest_step == progress.step > 0 else None
        return Result(
            state, reason, progress.trained_step, seconds, progress.before, after, progress.teacher, progress.best
        )


def example_parts(rollout: Rollout, show: Callable[[list[int]], str]) -> list[tuple[str, bool]]:
    """A sequence in pieces, each with whether the loss is on it: the prompt, what the student wrote, observations."""
    ids = rollout.sample.token_ids
    marked = zip(ids, rollout.sample.trained or [True] * len(ids), strict=True)
    pieces = [(show([token for token, _ in run]), key) for key, run in groupby(marked, key=lambda pair: pair[1])]
    return [(show(rollout.prompt.token_ids), False), *pieces]
