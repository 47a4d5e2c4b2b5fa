"""A teacher whose scores are checked: by a handshake before the first step, and at each use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from distill_cli.engines import handshake
from distill_cli.engines.base import OnEnd, Teacher
from distill_cli.engines.handshake import Answer, Probe
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import Unrecoverable
from distill_cli.types import ModelHead, Sample, TeacherScores

FEWEST_ROWS = 8
"""Tokens from which on scores are checked: fewer may well be the same."""


class GuardedTeacher(Teacher):
    """Pass everything on to `teacher`, and raise Unrecoverable, naming it, where its scores cannot be right.

    Scores of several sequences may not be uniform, constant or not finite. After its first sleep, and each time that it
    has come back (`Teacher.comebacks`), the answers of the handshake must have the scores that they had.
    """

    def __init__(
        self, teacher: Teacher, *, name: str, topk: int, vocab_size: int, temperature: float, limit: float
    ) -> None:
        """
        Args:
            name: as messages have it, such as "the teacher math (Qwen/Qwen3-8B)".
            limit: of `handshake.answers`.
        """
        self.num_ranks, self._teacher, self.name = teacher.num_ranks, teacher, name
        self.works_apart = teacher.works_apart
        self._answers = partial(
            handshake.answers, topk=topk, vocab_size=vocab_size, temperature=temperature, limit=limit
        )
        self.limit, self._vocab_size = limit, vocab_size
        self._probe: Probe | None = None
        self._sleeps, self._comebacks = 0, 0

    def shake_hands(self, prompts: Sequence[list[int]]) -> list[Answer]:
        """Let the awake teacher answer `prompts`; return what its answers say, and keep them to compare with later."""
        self._probe = handshake.make_probe(self._teacher, prompts)
        self._sleeps, self._comebacks = 0, self._teacher.comebacks
        return list(self._answers(self._probe))

    def forget(self) -> None:
        """Compare with the handshake no more: the teacher's weights will change."""
        self._probe = None

    @property
    def probe(self) -> Probe:
        """The handshake's."""
        assert self._probe is not None, "the handshake comes first"
        return self._probe

    def compare(self, before: Probe) -> None:
        """Raise Unrecoverable if the awake teacher no longer gives a probe's sequences the scores that they had."""
        now = self._teacher.score(before.sequences, response_starts=before.starts)
        if all(len(scores.sampled_logp) for scores in now):  # else interrupted
            self._refuse(handshake.difference(before.scores, now, limit=self.limit))

    def score(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> list[TeacherScores]:
        return self.submit(sequences, response_starts=response_starts, hidden=hidden)()

    def submit(
        self, sequences: Sequence[list[int]], *, response_starts: Sequence[int], hidden: bool = False
    ) -> Callable[[], list[TeacherScores]]:
        self._compare_if_due()
        wait = self._teacher.submit(sequences, response_starts=response_starts, hidden=hidden)
        is_varied = len({tuple(ids[:start]) for ids, start in zip(sequences, response_starts, strict=True)}) > 1

        def checked() -> list[TeacherScores]:
            found = wait()
            if is_varied and sum(len(scores.sampled_logp) for scores in found) >= FEWEST_ROWS:
                self._refuse(handshake.suspicion(found, vocab_size=self._vocab_size))
            return found

        return checked

    def _compare_if_due(self) -> None:
        """Compare after the first sleep and each comeback.

        Ranks that share an engine sleep and come back together, so all of them call it here or none does.
        """
        is_due = self._sleeps == 1 or self._teacher.comebacks != self._comebacks
        if self._probe is not None and is_due:
            self._sleeps, self._comebacks = 2, self._teacher.comebacks
            self.compare(self._probe)

    def _refuse(self, problem: str | None) -> None:
        if problem is not None:
            raise Unrecoverable(f"{self.name} {problem}; see `distill check`, and the ranks' logs")

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        on_end: OnEnd | None = None,
    ) -> list[Sample]:
        return self._teacher.sample(prompts, seeds=seeds, sampling=sampling, on_end=on_end)

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        return self._teacher.head(rows)

    @property
    def is_moving(self) -> bool:
        """Whether the teacher's weights change between its uses (`forget`)."""
        return self._probe is None

    def wait_ready(self) -> None:
        self._teacher.wait_ready()

    def wake(self) -> None:
        self._teacher.wake()

    def sleep(self) -> None:
        self._teacher.sleep()
        self._sleeps += 1

    def close(self) -> None:
        self._teacher.close()
