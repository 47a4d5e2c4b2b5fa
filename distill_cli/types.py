"""What passes between the stages of a step: prompts, rollouts, the teacher's scores. No torch at import time.

Everything is frozen: a stage returns something new instead of filling in what it was given.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import compress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Example:
    """A row of a dataset: what the user says, and the answer that a verifier compares with."""

    question: str
    """The user's message; the last one where there are `messages`. Blank where the row has none."""
    answer: str | None = None
    dataset: str = ""
    """Which of several datasets it comes from, for scores by dataset; sources that mix them name it."""
    response: str | None = None
    """A whole answer to imitate, where the dataset has one (worked solutions, chats)."""
    messages: tuple[dict[str, str], ...] = ()
    """A conversation up to the user's last message, each with `role` and `content`; empty: the question alone."""
    context: str | None = None
    """What only the teacher is shown, such as a reference solution (`data.teacher_context`)."""


@dataclass(frozen=True)
class Prompt:
    """An example as the student sees it: chat template applied, tokenized once."""

    index: int
    """Position in the order of the data: seeds and reports refer to it."""
    token_ids: list[int]
    example: Example
    teacher_token_ids: list[int] | None = None
    """What the teacher reads instead; None if it reads the same."""

    @property
    def ids_for_teacher(self) -> list[int]:
        """The prompt as the teacher reads it."""
        return self.token_ids if self.teacher_token_ids is None else self.teacher_token_ids


@dataclass(frozen=True)
class Sample:
    """What was written after a prompt."""

    token_ids: list[int]
    logp: list[float] | None
    """Log-probability of each token under the student at temperature 1, over the whole vocabulary, by the engine that
    sampled it. None if unknown: not asked for (`SamplingSettings.logp`), or not written by the student."""
    finish_reason: str
    """`stop` (the last of `token_ids` is an end-of-sequence or stop token, or ends a stop string), `length`, or
    `turn_limit` if the environment would have gone on."""
    trained: list[bool] | None = None
    """Which tokens the student wrote; the others are observations, whose `logp` means nothing. None: all of them."""
    num_turns: int = 1
    source: str = "student"
    """Who wrote it: `student`, `teacher` or `dataset`."""

    @property
    def written_ids(self) -> list[int]:
        """The tokens without observations."""
        return self.token_ids if self.trained is None else list(compress(self.token_ids, self.trained))

    @property
    def last_turn_ids(self) -> list[int]:
        """The tokens after the last observation."""
        if self.trained is None or all(self.trained):
            return self.token_ids
        return self.token_ids[len(self.trained) - self.trained[::-1].index(False) :]


@dataclass(frozen=True)
class Rollout:
    """A prompt with an answer to it, not scored yet."""

    prompt: Prompt
    sample: Sample
    reward: float | None = None
    """By the environment or the verifier; None if neither judges it."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.token_ids + self.sample.token_ids

    @property
    def ids_for_teacher(self) -> list[int]:
        """What the teacher scores: the prompt as it reads it, and the answer."""
        return self.prompt.ids_for_teacher + self.sample.token_ids


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's view of response tokens: of one sequence, or of several end to end.

    Row r is the teacher's distribution for response token r, given all tokens before it.
    """

    topk_ids: torch.Tensor
    """int32 [R, K], by falling log-probability."""
    topk_logp: torch.Tensor
    """float32 [R, K], of logits divided by `loss.temperature`, normalised over the whole vocabulary."""
    sampled_logp: torch.Tensor
    """float32 [R], of the response tokens themselves, normalised likewise."""

    @classmethod
    def empty(cls, topk: int = 1) -> TeacherScores:
        """Return the scores of no token."""
        import torch

        return cls(torch.empty(0, topk, dtype=torch.int32), torch.empty(0, topk), torch.empty(0))

    @classmethod
    def cat(cls, parts: Sequence[TeacherScores]) -> TeacherScores:
        """Join the rows of several."""
        import torch

        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def take(self, rows: torch.Tensor | slice) -> TeacherScores:
        """Return some of the rows."""
        return TeacherScores(*(getattr(self, field.name)[rows] for field in fields(self)))

    def first(self, topk: int) -> TeacherScores:
        """Return the scores with the `topk` likeliest tokens of each row."""
        return TeacherScores(self.topk_ids[:, :topk], self.topk_logp[:, :topk], self.sampled_logp)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TeacherScores:
        tensors = (getattr(self, field.name) for field in fields(self))
        return TeacherScores(*(tensor.to(device, non_blocking=non_blocking) for tensor in tensors))


@dataclass(frozen=True)
class TokenViews:
    """What both models say at each token of one response; lists of R, or of R lists of M tokens, the likeliest first.

    All log-probabilities are over the whole vocabulary, and at `loss.temperature` unless it says otherwise.
    A token that reaches no loss has None, and empty lists.
    """

    loss: list[float | None]
    """What training minimises: the divergence of the config's `loss`."""
    kl_forward: list[float | None]
    kl_reverse: list[float | None]
    """On the teacher's top-k and the rest as one more class, whatever the loss is."""
    entropy: list[float | None]
    """The student's."""
    student_logp: list[float | None]
    """Of the response's own token, at temperature 1."""
    teacher_logp: list[float | None]
    """Of the response's own token."""
    student_top_ids: list[list[int]]
    student_top_logp: list[list[float]]
    teacher_top_ids: list[list[int]]
    teacher_top_logp: list[list[float]]
