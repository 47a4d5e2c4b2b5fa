"""The protocols `Sampler` and `Teacher`: what training expects of an engine.

| where it runs                  | Sampler               | Teacher                         |
|--------------------------------|-----------------------|---------------------------------|
| in the rank's process          | `sampler.VllmSampler` | `teacher.VllmTeacher`           |
| in a second process per rank   |                       | `companion.CompanionTeacher`    |
| behind `distill serve`         |                       | `served.ServedTeacher`          |
| behind `vllm serve`            |                       | `vllm_server.VllmServerTeacher` |

An implementation subclasses its protocol, which provides `awake`. It lives in a file of its own in this folder and is
chosen in `ranks.build_engines`; no other module depends on which one it calls.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import Outgoing
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import ModelHead, Sample, TeacherScores

OnEnd = Callable[[int, Sample], object]
"""Takes the index of a prompt and its answer."""


@dataclass(frozen=True)
class Request:
    """A prompt to answer."""

    token_ids: list[int]
    seed: int
    max_new_tokens: int | None = None
    """Greatest length of this answer, at most that of `SamplingSettings`; None is that."""


Then = Callable[[int, Sample], Request | None]
"""Takes the index of a chain and the answer to its last request; returns its next request, or None if it has ended."""


class AnsweringEngine(Protocol):
    """A model that answers prompts, shared by `num_ranks` consecutive ranks.

    All of these call it at the same points with the same requests, and all get the results. Every method raises
    DistillError, with the reason, if the engine fails.
    """

    num_ranks: int
    """Ranks that share it; rank r belongs to engine r // num_ranks."""

    @abstractmethod
    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        """Return one answer to each prompt, in their order; prompt, seed and weights determine it.

        Answers are empty if the engine was interrupted because the run must stop.

        Args:
            on_end: called with each answer by the time that this method returns, where possible as soon as it has
                ended; not if the engine was interrupted.
        """

    def sample_chains(self, requests: Sequence[Request], *, sampling: SamplingSettings, then: Then) -> None:
        """Answer requests, and those that follow from their answers, until every chain has ended.

        Args:
            requests: the first request of each chain.
            then: called with each answer. Where possible its next request joins the others at once, while they are
                being answered; here it waits until all of them are. Not called after an interruption.
        """
        going = dict(enumerate(requests))
        while going:
            limits = {one.max_new_tokens for one in going.values()}
            assert limits == {None}, "answers of different lengths need an engine that continues chains at once"
            prompts, seeds = [one.token_ids for one in going.values()], [one.seed for one in going.values()]
            samples = self.sample(prompts, seeds=seeds, sampling=sampling)
            following = {index: then(index, sample) for index, sample in zip(going, samples, strict=True)}
            going = {index: one for index, one in following.items() if one is not None}

    def wake(self) -> None:
        """Take the device's memory; does nothing if the engine holds it or needs none."""
        return

    def sleep(self) -> None:
        """Give the device's memory back; does nothing for an engine that keeps it (`engine.<role>.sleep=false`)."""
        return

    def close(self) -> None:
        """Free the engine, before `destroy_process_group`; closing again does nothing."""
        return

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Hold the device's memory within the block, and give it back however the block is left."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # an engine cannot take what torch keeps for the next training step
        self.wake()
        try:
            yield
        finally:
            self.sleep()


class Sampler(AnsweringEngine, Protocol):
    """The student's engine, whose weights follow the trainer's."""

    version: int
    """Version of its weights: the last one that `sync` was given; negative before the first, and without weights."""

    @abstractmethod
    def sync(self, named_tensors: Iterable[Outgoing], *, version: int) -> None:
        """Replace the weights with the trainer's, and clear the prefix cache. A collective if they are DTensors."""

    @abstractmethod
    def reset_prefix_cache(self) -> None:
        """Clear the prefix cache: the next answers are those of an engine that was just built."""


class Teacher(AnsweringEngine, Protocol):
    """Scores sequences with the teacher's distribution; its own answers are sampled to measure it."""

    works_apart: bool = False
    """Whether it is always awake, and works while its caller does other things."""
    comebacks: int = 0
    """How often it came back after it could not be reached."""

    def wait_ready(self) -> None:
        """Block until the teacher can score; raises what building it would have raised."""
        return

    @abstractmethod
    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        """Return the scores of each sequence from its response's start on; empty ones if the engine was interrupted.

        Args:
            sequences: token ids of prompt and response.
            response_starts: index of the response's first token, at least 1.
            hidden: return the hidden states before the head instead of the top-k.
        """

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        """Return the head that makes logits of the hidden states. A collective of the ranks that share the engine.

        Args:
            rows: the first id of it and the one after the last; as far as it has them. None is all.

        Raises:
            ConfigError: it cannot be known.
        """
        raise ConfigError("loss.support: this teacher returns no hidden states; set teacher")

    def submit(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> Callable[[], list[TeacherScores]]:
        """Begin to score, and return a function that waits for the result of `score`.

        In a process of its own the teacher works while this one goes on.
        """
        scores = self.score(sequences, response_starts=response_starts, hidden=hidden)
        return lambda: scores


def check_starts(sequences: Sequence[list[int]], response_starts: Sequence[int]) -> None:
    """Raise DistillError for a response that begins outside its sequence."""
    for index, (ids, start) in enumerate(zip(sequences, response_starts, strict=True)):
        if not 1 <= start <= len(ids):
            what = f"the teacher: response {index} starts at {start} in a sequence of {len(ids)} tokens"
            raise DistillError(f"{what}, allowed are 1 to {len(ids)}")
