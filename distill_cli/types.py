"""Data passed between the stages of a step: prompts, rollouts, the teacher's scores. No torch at import time.

Every class is frozen: a stage returns new objects instead of filling in its arguments.

Shape letters: R response tokens of one sequence, K the teacher's top-k, H the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Example:
    """A row of a dataset: the user's message, and the answer that a verifier compares with."""

    question: str
    """The user's message; the last one if there are `messages`. Blank if the row has none."""
    answer: str | None = None
    dataset: str = ""
    """Name of the dataset, for scores by dataset; set by sources that mix several."""
    response: str | None = None
    """A whole answer to imitate, if the dataset has one (worked solutions, chats)."""
    messages: tuple[dict[str, str], ...] = ()
    """A conversation up to the user's last message, each with `role` and `content`; empty is the question alone."""
    context: str | None = None
    """Text for the teacher alone, such as a reference solution (`data.teacher_context`)."""
    teachers: tuple[tuple[str, float], ...] = ()
    """Names and weights of the teachers that the row asks for (`data.teacher_key`); empty if it does not say."""


@dataclass(frozen=True)
class Target:
    """A teacher that scores the answers to a prompt."""

    teacher: int = 0
    """Its index among the run's teachers, in the config's order."""
    weight: float = 1.0
    """Its share in the mixture of the prompt's teachers."""
    token_ids: list[int] | None = None
    """The prompt as it reads it; None if it is the student's."""


@dataclass(frozen=True)
class Prompt:
    """An example as the student reads it: chat template applied, tokenized once."""

    index: int
    """Position in the order of the data, which seeds and reports refer to."""
    token_ids: list[int]
    example: Example
    targets: tuple[Target, ...] = (Target(),)
    """The teachers that score its answers, by rising index: one, or several whose distributions are mixed."""

    def ids_for(self, target: Target) -> list[int]:
        """Return the token ids of the prompt as a teacher reads it."""
        return self.token_ids if target.token_ids is None else target.token_ids

    @property
    def main_target(self) -> Target:
        """The teacher with the largest weight, the first of several."""
        return max(self.targets, key=lambda target: target.weight)

    @property
    def teachers(self) -> int:
        """The set of its teachers: bit i stands for the teacher with index i."""
        return sum(1 << target.teacher for target in self.targets)


@dataclass(frozen=True)
class Sample:
    """A response to a prompt."""

    token_ids: list[int]
    logp: list[float] | None
    """Log-probability of each token under the student at temperature 1, over the whole vocabulary, by the engine that
    sampled it. None if unknown: not requested (`SamplingSettings.logp`), or not written by the student."""
    finish_reason: str
    """`stop` (the last of `token_ids` is an end-of-sequence or stop token, or ends a stop string), `length`, or
    `turn_limit` if the environment would have continued. Empty if the answer continues in a later step."""
    trained: list[bool] | None = None
    """True for tokens that the student wrote, False for observations, whose `logp` means nothing. None is all True."""
    num_turns: int = 1
    source: str = "student"
    """The writer: `student`, `teacher` or `dataset`."""

    @property
    def num_trained(self) -> int:
        """Number of tokens that the student wrote."""
        return len(self.token_ids) if self.trained is None else sum(self.trained)

    def __add__(self, other: Sample) -> Sample:
        """Return the tokens of both as one answer, with the other facts of `other`."""
        logp, trained = None, None
        if self.logp is not None and other.logp is not None:
            logp = self.logp + other.logp
        if self.trained is not None or other.trained is not None:
            trained = [flag for one in (self, other) for flag in one.trained or [True] * len(one.token_ids)]
        return replace(other, token_ids=self.token_ids + other.token_ids, logp=logp, trained=trained)

    def part(self, begin: int, end: int | None = None) -> Sample:
        """Return the tokens of a range."""
        lists = {name: getattr(self, name) for name in ("token_ids", "logp", "trained")}
        return replace(self, **{name: one and one[begin:end] for name, one in lists.items()})

    @property
    def written_ids(self) -> list[int]:
        """The tokens without those of observations."""
        return self.token_ids if self.trained is None else list(compress(self.token_ids, self.trained))

    @property
    def last_turn_ids(self) -> list[int]:
        """The tokens after the last observation."""
        if self.trained is None or all(self.trained):
            return self.token_ids
        return self.token_ids[len(self.trained) - self.trained[::-1].index(False) :]


@dataclass(frozen=True)
class Rollout:
    """A prompt and an answer to it, or what a step wrote of the answer; not scored yet."""

    prompt: Prompt
    sample: Sample
    reward: float | None = None
    """From the environment or the verifier; None if neither judged the answer."""
    carried: Sample | None = None
    """What earlier steps wrote of the answer, and trained on; None if they wrote nothing (`rollout.carry_over`)."""

    @property
    def answer(self) -> Sample:
        """The answer up to now."""
        return self.sample if self.carried is None else self.carried + self.sample

    @property
    def context_ids(self) -> list[int]:
        """Token ids before those of `sample`."""
        return self.prompt.token_ids if self.carried is None else self.prompt.token_ids + self.carried.token_ids

    @property
    def token_ids(self) -> list[int]:
        """Token ids of prompt and answer."""
        return self.context_ids + self.sample.token_ids

    def context_for(self, target: Target) -> list[int]:
        """Return the token ids before those of `sample`, with the prompt as a teacher reads it."""
        ids = self.prompt.ids_for(target)
        return ids if self.carried is None else ids + self.carried.token_ids

    def ids_for(self, target: Target) -> list[int]:
        """Return the token ids of the prompt as a teacher reads it and the answer, which it scores."""
        return self.context_for(target) + self.sample.token_ids


@dataclass(frozen=True)
class OwnText:
    """An answer in the tokens of a teacher with a tokenizer of its own, and what that says of the student's tokens.

    Shape letters: T tokens of the teacher, E entries; see `tokens.text_plan`, which makes it.
    """

    token_ids: torch.Tensor
    """int32 [T]"""
    places: torch.Tensor
    """int32 [R, 2]: the teacher's token in which the student's begins, below 0 if it is left out; and 1 where one of
    the teacher's begins there, else 0."""
    begun: torch.Tensor
    """int32 [E, 4]"""
    moves: torch.Tensor
    """int32 [E, 5]"""
    splits: torch.Tensor
    """int32 [E, 3]"""

    @classmethod
    def plain(cls, number: int) -> OwnText:
        """Return the text of a teacher with the student's tokens, `number` of them."""
        import torch

        ids = torch.full((number,), -1, dtype=torch.int32)
        places = torch.stack([torch.arange(number, dtype=torch.int32), torch.ones(number, dtype=torch.int32)], dim=1)
        return cls(ids, places, *(torch.empty(0, width, dtype=torch.int32) for width in (4, 5, 3)))

    @classmethod
    def cat(cls, parts: Sequence[OwnText]) -> OwnText:
        """Return several answers end to end."""
        import torch

        rows, texts, shifted = 0, 0, []
        for part in parts:
            places = part.places + part.places.new_tensor([texts, 0]) * (part.places[:, :1] >= 0)
            begun = part.begun + part.begun.new_tensor([rows, texts, 0, 0])
            moves = part.moves + part.moves.new_tensor([rows, texts, 0, 0, 0])
            shifted.append((part.token_ids, places, begun, moves, part.splits + part.splits.new_tensor([rows, 0, 0])))
            rows, texts = rows + len(part.places), texts + len(part.token_ids)
        return cls(*map(torch.cat, zip(*shifted, strict=True)))

    def take(self, rows: torch.Tensor | slice) -> OwnText:
        """Return some of the student's tokens with the whole text."""
        import torch

        places = self.places[rows]
        new = torch.full((len(self.places),), -1, dtype=torch.int32, device=self.places.device)
        new[rows] = torch.arange(len(places), dtype=torch.int32, device=self.places.device)
        kept = []
        for entries in (self.begun, self.moves, self.splits):
            entries = torch.cat([new[entries[:, :1].long()], entries[:, 1:]], dim=1)
            kept.append(entries[entries[:, 0] >= 0])
        return OwnText(self.token_ids, places, *kept)


@dataclass(frozen=True)
class TeacherScores:
    """The teacher's distributions at response tokens: of one sequence, or of several end to end.

    Row r is the teacher's distribution for response token r, given all tokens before it: by its top-k, or by the hidden
    state from which its head makes the distribution. The other is empty: [R, 0].
    """

    topk_ids: torch.Tensor
    """int32 [R, K], the likeliest first."""
    topk_logp: torch.Tensor
    """float32 [R, K], from logits divided by `loss.temperature`, normalised over the whole vocabulary."""
    sampled_logp: torch.Tensor
    """float32 [R], of the response tokens themselves, normalised in the same way; NaN with hidden states."""
    hidden: torch.Tensor
    """[R, H], of the engine's dtype: the last hidden state before the teacher's head. With `text` [T, H], of its
    tokens."""
    alignment: torch.Tensor
    """float32 [R, 2] if the teacher has a tokenizer of its own: 1 where a token of the teacher begins and 0 inside one,
    and the probability in its top-k of what is no token of the student's. Else [R, 0]."""
    text: OwnText | None = None
    """None if the teacher reads the student's tokens. With a top-k it has `splits` alone, and the student's tokens."""

    @classmethod
    def of_topk(cls, topk_ids: torch.Tensor, topk_logp: torch.Tensor, sampled_logp: torch.Tensor) -> TeacherScores:
        """Return scores by their top-k."""
        none = topk_logp.new_empty(len(sampled_logp), 0)
        return cls(topk_ids, topk_logp, sampled_logp, none, none)

    @classmethod
    def of_hidden(cls, hidden: torch.Tensor, text: OwnText | None = None) -> TeacherScores:
        """Return scores by hidden states."""
        import torch

        rows = len(hidden) if text is None else len(text.places)
        none = torch.empty(rows, 0, dtype=torch.int32), torch.empty(rows, 0)
        alignment = torch.empty(rows, 0)
        if text is not None:
            alignment = torch.stack([text.places[:, 1].float(), torch.zeros(rows)], dim=1)
        return cls(*none, torch.full((rows,), torch.nan), hidden, alignment, text)

    @classmethod
    def empty(cls, topk: int = 1) -> TeacherScores:
        """Return the scores of zero tokens."""
        import torch

        return cls.of_topk(torch.empty(0, topk, dtype=torch.int32), torch.empty(0, topk), torch.empty(0))

    @classmethod
    def cat(cls, parts: Sequence[TeacherScores]) -> TeacherScores:
        """Concatenate the rows of several scores; hidden states of several widths are padded with zeros."""
        import torch

        width = max(part.hidden.shape[1] for part in parts)
        if width:  # those of no tokens may have a top-k instead
            parts = [part for part in parts if part.hidden.shape[1]]
        padded = [torch.nn.functional.pad(part.hidden, (0, width - part.hidden.shape[1])) for part in parts]
        columns = ([getattr(part, name) for part in parts] for name in ("topk_ids", "topk_logp", "sampled_logp"))
        ids, logp, sampled_logp = map(torch.cat, columns)
        width = max(part.alignment.shape[1] for part in parts)
        alignment = [part.alignment if part.alignment.shape[1] else shared_tokens(part, width) for part in parts]
        text = None
        if any(part.text is not None for part in parts):
            text = OwnText.cat([part.text or OwnText.plain(len(part.sampled_logp)) for part in parts])
        return cls(ids, logp, sampled_logp, torch.cat(padded), torch.cat(alignment), text)

    def take(self, rows: torch.Tensor | slice) -> TeacherScores:
        """Return the scores of these rows."""
        names = ["topk_ids", "topk_logp", "sampled_logp", "alignment"]
        if self.text is None or not self.hidden.shape[1]:
            names.append("hidden")
        kept: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        return replace(self, **kept, text=None if self.text is None else self.text.take(rows))

    def first(self, topk: int) -> TeacherScores:
        """Return the scores cut to the `topk` likeliest tokens of each row."""
        return replace(self, topk_ids=self.topk_ids[:, :topk], topk_logp=self.topk_logp[:, :topk])

    @property
    def is_known(self) -> torch.Tensor:
        """bool [R]: False where the teacher says nothing of the student's token."""
        import torch

        if not self.alignment.shape[1]:
            return torch.ones_like(self.sampled_logp, dtype=torch.bool)
        return self.topk_ids[:, 0] >= 0 if self.topk_ids.shape[1] or self.text is None else self.text.places[:, 0] >= 0

    def to(self, device: torch.device, *, non_blocking: bool = False) -> TeacherScores:
        """Return the scores on `device`."""
        parts: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "text"}
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in parts.items()}
        text = self.text
        if text is not None:
            text = OwnText(*(tensor.to(device, non_blocking=non_blocking) for tensor in vars(text).values()))
        return replace(self, **moved, text=text)


def shared_tokens(scores: TeacherScores, width: int) -> torch.Tensor:
    """Return the `alignment` of scores by a teacher with the student's tokenizer: [R, width]."""
    alignment = scores.sampled_logp.new_zeros(len(scores.sampled_logp), width)
    alignment[:, :1] = 1.0
    return alignment


class HiddenSize(NamedTuple):
    """What memory the hidden states and the head of a teacher take."""

    width: int
    num_bytes: int
    """The bytes of one number."""
    own_ids: int | None = None
    """Rows of the head of a teacher with a tokenizer of its own; None is the student's vocabulary."""


LOGIT_ROWS = 8192
"""Rows of a head that are multiplied at a time."""


@dataclass(frozen=True)
class ModelHead:
    """A model's head: what makes logits of its last hidden state h.

    With r = h W^T + b they are scale r, or cap tanh(scale r / cap).
    """

    weight: torch.Tensor
    """[V, H], of the engine's dtype, on the CPU."""
    bias: torch.Tensor | None = None
    """[V]"""
    scale: float = 1.0
    soft_cap: float | None = None

    def part(self, rows: tuple[int, int] | None) -> ModelHead:
        """Return some ids' rows of it; None is all."""
        own = slice(*(rows or (None,)))
        return replace(self, weight=self.weight[own].clone(), bias=None if self.bias is None else self.bias[own])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of a few hidden states [n, H]: float64 [n, V]."""
        import torch

        pieces = self.weight.split(LOGIT_ROWS)  # a copy of the whole in float64 would take four times its memory
        raw = torch.cat([hidden.double() @ rows.double().t() for rows in pieces], dim=-1)
        raw = self.scale * (raw if self.bias is None else raw + self.bias.double())
        return raw if self.soft_cap is None else self.soft_cap * (raw / self.soft_cap).tanh()


@dataclass(frozen=True)
class TokenViews:
    """Both models' predictions at each token of one response: lists of R, or of R lists of M tokens, likeliest first.

    Log-probabilities are over the whole vocabulary, at `loss.temperature` unless a field states otherwise.
    A token without loss has None and empty lists.
    """

    loss: list[float | None]
    """The divergence of the config's `loss`, which training minimises."""
    kl_forward: list[float | None]
    kl_reverse: list[float | None]
    """Over the teacher's top-k and the rest as one more class; kl_forward likewise, whatever the loss is."""
    entropy: list[float | None]
    """The student's, in nats."""
    student_logp: list[float | None]
    """The response token's log-probability at temperature 1."""
    teacher_logp: list[float | None]
    """The response token's log-probability."""
    student_top_ids: list[list[int]]
    student_top_logp: list[list[float]]
    teacher_top_ids: list[list[int]]
    teacher_top_logp: list[list[float]]
