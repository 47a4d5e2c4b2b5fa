"""What passes between the stages of a step: prompts, rollouts, the teacher's scores. No torch at import time.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    """What the teacher reads in its place; None is the same."""


@dataclass(frozen=True)
class Sample:
    """What the sampler wrote after a prompt."""

    token_ids: list[int]
    logp: list[float]
    """Log-probability of each token under the student at temperature 1, over the whole vocabulary; empty where the
    sampler was not asked for it (`SamplingSettings.logp`)."""
    finish_reason: str
    """`stop` (the last of `token_ids` is an end-of-sequence or stop token, or ends a stop string), `length`, or
    `turn_limit` where the environment would have gone on."""
    trained: list[bool] | None = None
    """Which tokens the student wrote; the others are observations, whose `logp` says nothing. None is all of them."""
    num_turns: int = 1
    source: str = "student"
    """Who wrote it: `student`, `teacher` or `dataset`. What is not the student's has NaN for `logp`."""

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
class TeacherScores:
    """The teacher's view of one sequence, at its response positions only.

    Row r is the teacher's distribution for response token r, given all tokens before it.
    """

    topk_ids: torch.Tensor
    """int32 [R, K], by falling log-probability."""
    topk_logp: torch.Tensor
    """float32 [R, K], of logits divided by `loss.temperature`, normalised over the whole vocabulary."""
    sampled_logp: torch.Tensor
    """float32 [R], of the response tokens themselves, normalised likewise."""


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


@dataclass
class Rollout:
    """A prompt with the student's answer and, once scored, the teacher's scores."""

    prompt: Prompt
    sample: Sample
    reward: float | None = None
    scores: TeacherScores | None = None
    views: TokenViews | None = None
    """Where the sequence is recorded for a look at it; the main rank's."""

    @property
    def token_ids(self) -> list[int]:
        return self.prompt.token_ids + self.sample.token_ids

    @property
    def teacher_prompt_ids(self) -> list[int]:
        """The prompt as the teacher reads it."""
        return self.prompt.token_ids if self.prompt.teacher_token_ids is None else self.prompt.teacher_token_ids

    @property
    def teacher_token_ids(self) -> list[int]:
        """What the teacher scores: its own prompt, and the student's answer."""
        return self.teacher_prompt_ids + self.sample.token_ids
