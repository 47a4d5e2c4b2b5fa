"""The student is sampled on ranks of their own (`cluster.roles=split`): both sides of it.

The ranks that train command those that sample, which do one command after the other:

| command    | what the ranks that sample do                             | answer                                   |
|------------|-----------------------------------------------------------|------------------------------------------|
| `sync`     | take the weights that follow, with their version          |                                          |
| `step`     | write the sequences of the next step (`StepWriter`)       | the step, and what each slot goes on with |
| `sample`   | answer prompts, for recorded samples                      | rollouts                                 |
| `validate` | answer the validation prompts                             | a score                                  |
| `close`    | end                                                       |                                          |

The steps that are commanded before others are trained on follow from `rollout.staleness` alone, and each is sampled
with the weights of the last `sync` before it: nothing depends on which side is faster.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from distill_cli.engines.weight_sync import Deferred, Outgoing, full_tensors, shapes_of
from distill_cli.metrics import SAMPLE_S
from distill_cli.parallel.bridge import WeightChannel
from distill_cli.parallel.roles import Bridge
from distill_cli.rollout.in_flight import InFlight, SampledStep, Slot
from distill_cli.rollout.score_files import Recorder
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages, StopRequested
from distill_cli.rollout.step_writer import StepWriter
from distill_cli.rollout.workers import PendingScores, RolloutWorker, ScoringWorker
from distill_cli.types import Prompt, Rollout

log = logging.getLogger(__name__)


@dataclass
class SamplingRanks:
    """The ranks that sample, as those that train see them. Every one of these calls it at the same points."""

    bridge: Bridge
    weights: Callable[[], Iterable[Outgoing]]
    """Returns the student's weights as `Sampler.sync` takes them. A collective."""
    version: Callable[[], int]
    """Returns the version of the student's weights."""
    dtype: torch.dtype
    """The engine's, to which matrices are cast before they travel."""
    stages: Stages
    on_step: Callable[[int, SampledStep], object] = lambda step, sampled: None
    """Called with each step as soon as it is sampled, in a thread."""
    _sent: int | None = None
    """The last version that was sent."""
    _steps: dict[int, Future[tuple[SampledStep, tuple[Slot, ...]]]] = field(default_factory=dict)
    """Those that were not taken. An answer may come before this rank has begun the step: others are ahead of it."""
    _answers: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    """Answers to commands other than `step`."""
    _error: BaseException | None = None
    """Why no more answers come."""

    def __post_init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # the thread's
        self._thread = threading.Thread(target=self._listen, name="sampled", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        """Take answers until the ranks that sample end. Every rank that trains runs it: a collective."""
        try:
            while True:
                box: list[Any] = [self.bridge.answers.take() if self.stages.parallel.is_main else None]
                dist.broadcast_object_list(box, src=0, group=self._group)
                command, answer = box[0]
                if command == "close":
                    return
                if command == "step":
                    step, sampled, slots = answer
                    self.on_step(step, sampled)
                    self._future(step).set_result((sampled, slots))
                else:
                    self._answers.put(answer)
        except BaseException as error:  # the main thread raises it
            log.info("no more answers of the ranks that sample", exc_info=True)
            self._error = error
            self._answers.put(error)
            for future in list(self._steps.values()):
                if not future.done():
                    future.set_exception(error)

    def _future(self, step: int) -> Future[tuple[SampledStep, tuple[Slot, ...]]]:
        return self._steps.setdefault(step, Future())

    def sync(self) -> None:
        """Send the student's weights, unless they are there. A collective."""
        if (version := self.version()) == self._sent:
            return
        weights = list(self.weights())
        self._command("sync", version=version, shapes=shapes_of(weights))
        tensors = full_tensors(weights, dtype=self.dtype)
        if self.bridge.weights is not None:
            self.bridge.weights.send(tensors)
        else:
            for _ in tensors:  # collective
                pass
        self._sent = version

    def begin(self, step: int) -> None:
        """Let them write the next step's sequences with the weights that they have."""
        self._command("step", step=step)

    def take(self, step: int) -> tuple[SampledStep, tuple[Slot, ...]]:
        """Block until a step that has begun is there; return it, once."""
        future = self._future(step)
        if self._error is not None:
            raise self._error
        found = future.result()
        del self._steps[step]
        return found

    def ask(self, command: str, **arguments: Any) -> Any:
        """Return the answer to a command. Steps that have begun are written before it."""
        self._command(command, **arguments)
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """Let them end, also in the middle of a step."""
        if self.stages.parallel.is_main:
            self.bridge.commands.close()
        self._command("close")
        self._thread.join()

    def _command(self, command: str, **arguments: Any) -> None:
        if self.stages.parallel.is_main:
            self.bridge.commands.put((command, arguments))

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Bring the weights; check for a stop at the end, as `RolloutWorker.ready`."""
        with self.stages("sync"):
            self.sync()
        yield
        self.stages.check_stop()

    def sample(self, prompts: Sequence[Prompt], *, step: int) -> list[Rollout]:
        """Return one judged answer to each prompt; see `RolloutWorker.sample`."""
        rollouts: list[Rollout] = self.ask("sample", prompts=list(prompts), step=step)
        return rollouts

    def validate(self) -> Any:
        """Return the student's score on the validation prompts. A collective."""
        with self.ready(), self.stages("eval"):
            return self.ask("validate")


@dataclass
class SplitSource(RolloutSource):
    """Sequences that other ranks sample, scored by the teachers of the ranks that train."""

    ranks: SamplingRanks
    scoring: ScoringWorker
    recorder: Recorder | None = None
    staleness: int = 0
    in_flight: InFlight = field(default_factory=InFlight)
    """At the beginning: after the last step that was trained on."""
    keeps_slots: bool = False
    """Whether answers go on in later steps (`rollout.carry_over`)."""

    def __post_init__(self) -> None:
        first = self.in_flight.sampled_step - len(self.in_flight.waiting) + 1
        self._waiting = {first + index: sampled for index, sampled in enumerate(self.in_flight.waiting)}
        self._begun, self._slots = self.in_flight.sampled_step, {self.in_flight.sampled_step: self.in_flight.slots}
        self._trained, self._committed = first - 1, self.in_flight.sampled_step
        self._now = first - 1
        self._scores: dict[int, PendingScores] = {}
        if self.scoring.can_begin:
            self.ranks.on_step = self._begin_scores

    def _begin_scores(self, step: int, sampled: SampledStep) -> None:
        """Let the ranks that score begin, while this one may train on an earlier step."""
        self._scores[step] = self.scoring.begin_step(sampled.rollouts, slots=sampled.slots)

    def step(self, step: int) -> ScoredBatch:
        ranks, stages = self.ranks, self.ranks.stages
        if self._begun < step - 1:  # nothing is in flight
            self._begun = step - 1
        stages.check_stop(within_s=stages.longest_s)
        with stages("sync"):
            ranks.sync()
            while self._begun < step + self.staleness:
                self._begun += 1
                ranks.begin(self._begun)
        with stages("sample"):
            sampled = self._sampled(step)
        if (pending := self._scores.pop(step, None)) is not None:
            batch = self.scoring.finish_step(pending)
        else:
            batch = self.scoring.score(sampled.rollouts, slots=sampled.slots)
        if self.recorder is not None:
            with stages("record"):
                self.recorder.write(step, batch)
        self._now = step
        return replace(batch, is_current=self.staleness == 0, metrics={**batch.metrics, **sampled.metrics})

    def _sampled(self, step: int) -> SampledStep:
        if step not in self._waiting:
            self._waiting[step], self._slots[step] = self.ranks.take(step)
        return self._waiting[step]

    def commit(self) -> None:
        self._trained, self._committed = self._now, self._begun
        self._waiting.pop(self._now, None)
        self._slots = {step: kept for step, kept in self._slots.items() if step >= self._now}

    @property
    def state(self) -> InFlight | None:
        """What is in flight after the last step that was trained on; waits for the steps that have begun."""
        if self.staleness == 0 and not self.keeps_slots:
            return None
        waiting = tuple(self._sampled(step) for step in range(self._trained + 1, self._committed + 1))
        return InFlight(self._committed, waiting, self._slots[self._committed])


class IncomingWeights:
    """The student's weights on a rank that samples."""

    def __init__(self, channel: WeightChannel) -> None:
        self._channel = channel
        self.version = -1

    def unknown(self) -> list[Outgoing]:
        """Stand for the weights between two syncs, in which no engine asks for them."""
        raise AssertionError("the ranks that train send the weights")

    def outgoing(self, shapes: Sequence[tuple[str, torch.Size]]) -> list[Outgoing]:
        """Return the tensors that are on their way, as `Sampler.sync` takes them: each is received when it is made."""
        stream, early = self._channel.receive(), dict[str, torch.Tensor]()

        def make(name: str) -> torch.Tensor:
            while name not in early:
                other, tensor = next(stream)
                early[other] = tensor
            tensor = early.pop(name)
            if name == last:
                assert next(stream, None) is None, "more weights than announced"
            return tensor

        last = shapes[-1][0]
        return [(name, Deferred(shape, partial(make, name))) for name, shape in shapes]


def serve(
    writer: StepWriter,
    weights: IncomingWeights,
    bridge: Bridge,
    *,
    in_flight: InFlight,
    validate: Callable[[RolloutWorker], Any],
) -> None:
    """Do what the ranks that train command, on all ranks that sample, until they end it. A collective.

    Args:
        in_flight: after the last step that was sampled.
        validate: returns the student's score on the validation prompts.
    """
    worker, now = writer.worker, replace(in_flight, waiting=())
    parallel = worker.stages.parallel
    while True:
        box: list[Any] = [bridge.commands.take() if parallel.is_main else None]
        dist.broadcast_object_list(box, src=0)
        command, arguments = box[0]
        answer: Any = None
        try:
            if command == "close":
                if parallel.is_main:
                    bridge.answers.put((command, None))
                return
            if command == "sync":
                weights.version = arguments["version"]
                worker.sampler.sync(weights.outgoing(arguments["shapes"]), version=weights.version)
                continue
            if command == "step":
                begin, step = time.perf_counter(), arguments["step"]
                now = writer.write(replace(now, sampled_step=step - 1))
                (sampled,), seconds = now.waiting, time.perf_counter() - begin
                now = replace(now, waiting=())
                answer = step, replace(sampled, metrics={**sampled.metrics, SAMPLE_S: seconds}), now.slots
            elif command == "sample":
                with worker.ready():
                    answer = worker.sample(**arguments)
            else:
                answer = validate(worker)
        except StopRequested:  # they are about to end
            continue
        if parallel.is_main:
            bridge.answers.put((command, answer))
