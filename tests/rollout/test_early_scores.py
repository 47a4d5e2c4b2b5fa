"""What is scored while others are sampled: which sequences together, and whose scores go where."""

from collections.abc import Callable

import pytest
import torch

from distill_cli.engines.base import Teacher
from distill_cli.rollout.early_scores import EarlyScores
from distill_cli.types import Example, Prompt, Rollout, Sample, Target, TeacherScores
from tests.student.forked import run_cases


class Later(Teacher):
    """Has a sequence's scores only once they are waited for; the score of each token is its id."""

    num_ranks = 1
    sample = score = None  # not called

    def __init__(self) -> None:
        self.submitted: list[int] = []
        self.waits = 0

    def submit(self, sequences, *, response_starts, hidden=False) -> Callable[[], list[TeacherScores]]:
        self.submitted.append(len(sequences))

        def wait() -> list[TeacherScores]:
            self.waits += 1
            return [scores_of(ids[start:]) for ids, start in zip(sequences, response_starts, strict=True)]

        return wait


def scores_of(token_ids: list[int]) -> TeacherScores:
    values = torch.tensor(token_ids, dtype=torch.float32)
    return TeacherScores.of_topk(values[:, None].int(), -values[:, None], -values)


def rollout(*token_ids: int) -> Rollout:
    """Three tokens of a prompt, which is five for the teacher, and an answer."""
    prompt = Prompt(0, [1, 2, 3], Example("?"), (Target(token_ids=[1, 2, 3, 4, 5]),))
    return Rollout(prompt, Sample(list(token_ids), [0.0] * len(token_ids), "stop"))


def test_sequences_are_scored_by_the_batch_as_they_end() -> None:
    teacher = Later()
    early = EarlyScores([teacher], batch_tokens=12)
    for place, answer in {7: [50], 2: [60, 61], 9: [70], 0: [80, 81]}.items():
        early.add(place, rollout(*answer))
    assert teacher.submitted == [2, 2]  # 13 tokens in each
    early.add(4, rollout(90))
    assert (teacher.submitted, teacher.waits) == ([2, 2], 0)
    found = early.collect()
    assert (teacher.submitted, teacher.waits) == ([2, 2, 1], 3)
    assert {place: scores.sampled_logp.tolist() for place, scores in found.items()} == {
        **{(7, 0): [-50], (2, 0): [-60, -61], (9, 0): [-70], (0, 0): [-80, -81], (4, 0): [-90]}
    }
    assert EarlyScores([teacher], batch_tokens=12).collect() == {}


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.exhaustive
def test_scores_go_to_the_ranks_that_train_on_them(ranks: int) -> None:
    """Place p is scored on rank p modulo the ranks, and trained on by the ranks that `needed` names it for."""
    needed = [[3, 0, 5], [4, 1], [4, 1, 2, 6, 7]][:ranks]  # two ranks may share sequences, and some are nobody's
    (found,) = run_cases("tests.rollout.deliver_rank", [{"ranks": ranks, "needed": needed}])
    assert found == [{place: [-float(place)] * (place + 1) for place in places} for places in needed]
