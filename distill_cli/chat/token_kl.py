"""The KL of each token of an answer: the student's engine and the teacher's score it, and the fused head compares.

The student's predictions are made of its engine's hidden states and head, in float32 on the CPU. What compares them
with the teacher is what trains: the same scores, loss and head as in a step (`losses.linear_divergence`).

Shape letters: R tokens of the answer, N those that the teacher says something of, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PreTrainedTokenizerBase

from distill_cli.chat.answers import Speaker
from distill_cli.chat.conversation import Question, Turn
from distill_cli.chat.setup import Pair, Setup, pair_of
from distill_cli.chat.start import EngineTeacher
from distill_cli.data.prompts import PromptMaker
from distill_cli.engines.base import Teacher
from distill_cli.errors import ConfigError
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.logit_transform import LogitTransform
from distill_cli.losses.objective import BatchLoss, Facts
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.scored_teacher import ScoredHead, scored_teacher
from distill_cli.ranks.build_source import build_translations, prompt_settings
from distill_cli.ranks.build_student import build_objective
from distill_cli.rollout.early_scores import submit
from distill_cli.rollout.pack import MicroBatch, RowPlan, lay_out
from distill_cli.train.token_report import NO_LOSS, NUM_TOP, token_values
from distill_cli.types import ModelHead, Prompt, Rollout, Target, TokenViews


@dataclass(frozen=True)
class AnswerKl:
    """An answer with both models' predictions at each token."""

    texts: list[str]
    """The text of each token, special ones too."""
    views: TokenViews
    likeliest: Callable[[int], str]
    """Returns the text of a token id."""


class Comparison:
    """Compares the answers of one model with its teacher."""

    def __init__(self, speaker: Speaker, pair: Pair, teacher: Teacher) -> None:
        self._speaker, self._teacher, self._pair = speaker, teacher, pair
        self._student = EngineTeacher(speaker.engine, temperature=1.0)
        alone = pair.alone
        self._objective = build_objective(alone.config)
        self._hidden = alone.config.loss.needs_hidden
        self._translation = build_translations(alone).get(0)
        settings = replace(prompt_settings(alone), system_prompt=None)  # a conversation brings its own
        self._make = PromptMaker(self._tokenizer, settings)

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return self._speaker.conversation.make.tokenizer

    @cached_property
    def _head(self) -> Head:
        """The student's, read once."""
        return in_float32(self._student.head())

    @cached_property
    def _teacher_head(self) -> ScoredHead:
        vocabulary, tokens = self._pair.resolved.vocabulary, self._translation
        if tokens is None:
            return ScoredHead(in_float32(self._teacher.head((0, vocabulary.size))), vocabulary.size)
        firsts = tokens.firsts
        head = in_float32(self._teacher.head((0, len(firsts))))
        return ScoredHead(head, vocabulary.size, OwnHead(firsts, len(firsts)))

    def measure(self, turn: Turn) -> AnswerKl:
        """Compare an answer, a token at a time.

        Raises:
            ConfigError: it cannot be compared.
            DistillError: an engine failed.
        """
        sample = turn.sample
        if not sample.token_ids:
            raise ConfigError("KL: the answer has no tokens yet")
        target = Target(token_ids=self._teacher_prompt(turn.question))
        rollout = Rollout(Prompt(0, turn.question.prompt_ids, turn.question.example, (target,)), sample)
        most = self._pair.teacher_length
        if self._translation is None and (length := len(rollout.ids_for(target))) > most:
            raise ConfigError(
                f"KL: the conversation has {length} tokens, and the teacher reads {most}; /reset begins anew"
            )
        wait = submit(
            [(rollout, target)],
            self._teacher,
            merged_eos_ids=self._pair.resolved.vocabulary.merged_eos_ids,
            hidden=self._hidden,
            translation=self._translation,
        )
        (scores,) = wait()
        number = len(rollout.token_ids)
        batch = lay_out(RowPlan((0,), (number,), number), [rollout], {0: scores})
        start = [len(turn.question.prompt_ids)]
        (own,) = self._student.score([rollout.token_ids], response_starts=start, hidden=True)
        output = self._compare(own.hidden[batch.origins[:, 1]].float(), batch)
        rows = [NO_LOSS] * len(sample.token_ids)  # where the teacher says nothing
        for place, values in zip(batch.origins[:, 1].tolist(), token_values(output), strict=True):
            rows[place] = values
        views = TokenViews(*map(list, zip(*rows, strict=True)))
        return AnswerKl([self._text(one) for one in sample.token_ids], views, self._text)

    def _compare(self, hidden_NH: torch.Tensor, batch: MicroBatch) -> HeadOutput:
        position_N, length_N = batch.trained_places.unbind(-1)
        known = batch.teachers, batch.sampler_logp, batch.has_sampler_logp
        facts = Facts(*known, position_N, length_N, batch.advantages)
        objective, translation = self._objective, self._translation
        teacher = scored_teacher(
            batch.scores,
            objective,
            groups=None if translation is None else translation.groups,
            head=self._teacher_head if batch.scores.hidden.shape[1] else None,
            student_size=len(self._head.weight_VH),
        )
        return linear_divergence(
            hidden_NH,
            self._head,
            teacher,
            BatchLoss({}, objective, facts, num_loss_tokens=torch.ones(())),
            sampled_ids_N=batch.sampled_ids,
            temperature=objective.temperature,
            num_top=NUM_TOP,
            merged_eos_ids=self._pair.resolved.vocabulary.merged_eos_ids,
        )

    def _teacher_prompt(self, question: Question) -> list[int] | None:
        """Return the conversation as the teacher reads it; None if it is the student's. Raises ConfigError."""
        (teacher,) = self._make.settings.teachers
        if not self._make.settings.has_own_prompt(teacher):
            return None
        try:
            return self._make.teacher_ids(teacher, question.example, len(question.example.question))
        except Exception as error:  # a template is the user's code and may raise anything
            raise ConfigError(f"KL: the teacher's chat template fails: {type(error).__name__}: {error}") from error

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


@dataclass
class KlMeter:
    """Compares answers with the teacher, which is started or connected to when it is first needed."""

    setup: Setup
    find_teacher: Callable[[Pair, Speaker], Teacher]
    _teacher: Teacher | None = None
    """None before it is needed."""
    _pairs: dict[str, Pair] = field(default_factory=dict)
    _comparisons: dict[str, Comparison] = field(default_factory=dict)

    @property
    def is_ready(self) -> bool:
        """Whether the teacher was started or connected to."""
        return self._teacher is not None

    def pair(self, speaker: Speaker) -> Pair:
        """Return a model with its teacher. Raises ConfigError if they cannot be compared."""
        if speaker.name not in self._pairs:
            pair = pair_of(self.setup, speaker.model)
            if any(one.alone.vocabulary.limit != pair.alone.vocabulary.limit for one in self._pairs.values()):
                raise ConfigError(
                    f"KL: {speaker.name} shares other tokens with the teacher, whose engine is cut to them"
                )
            self._pairs[speaker.name] = pair
        return self._pairs[speaker.name]

    def measure(self, speaker: Speaker, turn: Turn) -> AnswerKl:
        """Compare an answer; see `Comparison`."""
        pair = self.pair(speaker)
        if speaker.name not in self._comparisons:
            is_student = pair.alone.config.model.teacher.is_student
            if self._teacher is None or is_student:
                self._teacher = self.find_teacher(pair, speaker)
            self._comparisons[speaker.name] = Comparison(speaker, pair, self._teacher)
        return self._comparisons[speaker.name].measure(turn)

    def close(self) -> None:
        """End the connection to the teacher, or its engine."""
        if self._teacher is not None:
            self._teacher.close()


def in_float32(head: ModelHead) -> Head:
    """Return a head of an engine as the fused head takes it."""
    bias = None if head.bias is None else head.bias.float()
    return Head(head.weight.float(), bias, LogitTransform(head.scale, head.soft_cap))
