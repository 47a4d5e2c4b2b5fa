"""The handshake with a real engine, and with defects planted in what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save

from distill_cli.engines.base import Teacher
from distill_cli.engines.guarded import GuardedTeacher
from distill_cli.engines.handshake import EXACT, answers, difference, from_tensors, make_probe, to_tensors
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.errors import Unrecoverable
from distill_cli.types import TeacherScores

from .reference import VOCAB_SIZE, random_sequences

pytestmark = pytest.mark.slow

TOPK = 16
PROMPTS = random_sequences([12, 9, 14, 10])
SEQUENCES = random_sequences([20, 30, 25])
STARTS = [8, 9, 10]

Change = Callable[[TeacherScores], TeacherScores]


class Planted(Teacher):
    """A teacher whose scores are changed on their way."""

    def __init__(self, teacher: Teacher, change: Change = lambda scores: scores) -> None:
        self._teacher, self.change, self.num_ranks, self.num_scored = teacher, change, 1, 0

    def sample(self, prompts, *, seeds, sampling, on_end=None):
        return self._teacher.sample(prompts, seeds=seeds, sampling=sampling)

    def score(self, sequences, *, response_starts, hidden=False) -> list[TeacherScores]:
        self.num_scored += 1
        return [self.change(one) for one in self._teacher.score(sequences, response_starts=response_starts)]


def filled(value: float) -> Change:
    def change(scores: TeacherScores) -> TeacherScores:
        return replace(
            scores,
            topk_logp=torch.full_like(scores.topk_logp, value),
            sampled_logp=torch.full_like(scores.sampled_logp, value),
        )

    return change


def one_later(scores: TeacherScores) -> TeacherScores:
    """Those of the position before, as if the first token had been forgotten."""
    return scores.take(torch.arange(len(scores.sampled_logp)).roll(1))


def guarded(teacher: Teacher, *, temperature: float = 1.0, topk: int = TOPK) -> GuardedTeacher:
    options = {"topk": topk, "vocab_size": VOCAB_SIZE, "temperature": temperature, "limit": EXACT}
    return GuardedTeacher(teacher, name="the teacher (here)", **options)


def problems(teacher: Teacher, **options) -> list[str]:
    found = guarded(teacher, **options).shake_hands(PROMPTS)
    return [f"{one.what}: {one.problem}" for one in found if one.problem is not None]


@pytest.fixture(scope="module")
def hot(process_group, teacher, teacher_settings) -> Iterator[VllmTeacher]:
    scorer = VllmTeacher(teacher_settings, topk=TOPK, temperature=1.5)
    yield scorer
    scorer.close()


def test_sound_teachers_pass(scorer, hot) -> None:
    assert problems(scorer) == []
    assert problems(hot, temperature=1.5) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (filled(float("nan")), "scores: gives scores that are not finite"),
        (filled(-math.log(VOCAB_SIZE)), f"scores: gives every token the same probability, 1/{VOCAB_SIZE}"),
        (one_later, "position: scores other tokens than those it is given"),
        (lambda scores: scores.first(8), "top-k: its top-k is not one of 16 tokens: 8 tokens"),
        (lambda scores: replace(scores, topk_logp=scores.topk_logp.flip(-1)), "top-k: its top-k is not one of 16"),
    ],
)
def test_planted_defects_are_named(scorer, change: Change, problem: str) -> None:
    found = problems(Planted(scorer, change))
    assert found
    assert found[0].startswith(problem), found


def test_constant_scores_are_named(scorer) -> None:
    (one,) = scorer.score([SEQUENCES[0][:9]], response_starts=[8])
    found = problems(Planted(scorer, lambda scores: one.take(torch.zeros(len(scores.sampled_logp), dtype=torch.int64))))
    assert found == ["scores: gives the same scores at every token"]


def test_temperature_on_one_side_is_seen(scorer, hot) -> None:
    assert problems(scorer, temperature=1.5)[0].startswith("temperature: does not score at loss.temperature")
    assert problems(hot)[0].startswith("temperature: does not score at loss.temperature")


def test_every_use_is_checked(scorer) -> None:
    planted = Planted(scorer)
    teacher = guarded(planted)
    assert len(teacher.score(SEQUENCES, response_starts=STARTS)) == 3
    for change in (filled(float("nan")), filled(-math.log(VOCAB_SIZE))):
        planted.change = change
        with pytest.raises(Unrecoverable, match=r"the teacher \(here\) gives"):
            teacher.submit(SEQUENCES, response_starts=STARTS)()
    planted.change = filled(-1.0)
    assert teacher.score([SEQUENCES[0]] * 2, response_starts=[19, 19])  # of one prompt they may be the same
    assert teacher.score([], response_starts=[]) == []


def test_other_scores_after_a_sleep_end_it(scorer) -> None:
    planted = Planted(scorer)
    teacher = guarded(planted)
    teacher.shake_hands(PROMPTS)
    for _ in range(3):
        teacher.sleep()
        teacher.wake()
        teacher.score(SEQUENCES, response_starts=STARTS)
    assert planted.num_scored == 1 + 3 + 1  # compared once
    teacher.shake_hands(PROMPTS)
    teacher.sleep()
    planted.change = one_later
    with pytest.raises(Unrecoverable, match="gives other scores than before"):
        teacher.score(SEQUENCES, response_starts=STARTS)


def test_scores_are_compared_after_a_comeback(scorer) -> None:
    planted = Planted(scorer)
    teacher = guarded(planted)
    teacher.shake_hands(PROMPTS)
    planted.comebacks, planted.change = 1, one_later
    with pytest.raises(Unrecoverable, match="gives other scores than before"):
        teacher.score(SEQUENCES, response_starts=STARTS)


def test_probes_tell_models_apart(scorer, process_group, student, student_settings) -> None:
    probe = make_probe(scorer, PROMPTS)
    stored = from_tensors(load(save(to_tensors(probe))))
    assert (stored.sequences, stored.starts) == (probe.sequences, probe.starts)
    again = scorer.score(stored.sequences, response_starts=stored.starts)
    assert difference(stored.scores, again, limit=EXACT) is None
    other = VllmTeacher(student_settings, topk=TOPK)
    now = other.score(stored.sequences, response_starts=stored.starts)
    assert "nats a token off" in difference(stored.scores, now, limit=EXACT)
    assert [one.what for one in answers(probe, topk=TOPK, vocab_size=VOCAB_SIZE, temperature=1.0, limit=EXACT)] == [
        *("scores", "top-k", "position", "temperature")
    ]
    other.close()
