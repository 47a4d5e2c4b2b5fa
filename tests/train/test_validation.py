"""Validation and the scoreboard with a double of an engine that knows some answers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill_cli.config.checks import config_problems, evaluation_problems
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.data.isolated import IsolatedVerifier
from distill_cli.data.registry import resolve_extract, resolve_verifier
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.folders.answers_table import AnswersFile, join_answers
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.report.eval_results import make_scoreboard, read_problems
from distill_cli.rollout.workers import Responder
from distill_cli.train.validation import Score, Validator, answer_row, first_of_each
from distill_cli.types import Example, Prompt, Sample

EXACT = IsolatedVerifier("exact")


class Oracle(AnsweringEngine):
    """Answers `#### <first token>`; every answer but a problem's first is wrong if the first token is odd."""

    num_ranks = 1

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.largest_batch = 0

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        self.seeds += seeds
        self.largest_batch = max(self.largest_batch, len(prompts))
        num_answers: dict[int, int] = {}
        samples = []
        for (first,) in prompts:
            num_answers[first] = num_answers.get(first, 0) + 1
            wrong = first % 2 and num_answers[first] > 1
            samples.append(Sample([first + 1 if wrong else first, 0], [0.0, 0.0], "length" if wrong else "stop"))
        return samples


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()
    EXACT.close()


def validator(parallel: Parallel, prompts: list[Prompt], *, repeat: int = 1, batch_size: int = 64) -> Validator:
    return Validator(
        prompts=prompts,
        responder=Responder(
            SamplingSettings(max_new_tokens=4), seed=0, decode=lambda ids: f"#### {ids[0]}", verify=EXACT
        ),
        batch_size=batch_size,
        parallel=parallel,
        repeat=repeat,
    )


def prompts(number: int, *, datasets: tuple[str, ...] = ("",)) -> list[Prompt]:
    return [Prompt(i, [i], Example("?", str(i), dataset=datasets[i % len(datasets)])) for i in range(number)]


def test_score_is_the_mean(parallel: Parallel) -> None:
    score = validator(parallel, prompts(4), repeat=2).run(Oracle())
    assert score == Score(accuracy=0.75, mean_length=2.0, truncated_rate=0.25, num_samples=8)
    assert score.metrics().keys() == {"val/accuracy", "val/mean_length", "val/truncated_rate"}


def test_several_datasets_have_an_accuracy_each(parallel: Parallel) -> None:
    score = validator(parallel, prompts(4, datasets=("even", "odd")), repeat=2).run(Oracle())
    assert score.metrics()["val/even/accuracy"] == 1.0
    assert score.metrics()["val/odd/accuracy"] == 0.5
    assert score.accuracy == 0.75


def test_answer_seeds_are_unique_and_stable(parallel: Parallel) -> None:
    few, many = Oracle(), Oracle()
    validator(parallel, prompts(5)).run(few)
    validator(parallel, prompts(5), repeat=3, batch_size=4).run(many)
    assert len(set(many.seeds)) == 15
    assert set(few.seeds) <= set(many.seeds)
    assert many.largest_batch == 4


def test_max_samples_are_of_each_dataset() -> None:
    chosen = first_of_each(prompts(10, datasets=("a", "b")), 2)
    assert [prompt.index for prompt in chosen] == [0, 1, 2, 3]
    assert [prompt.index for prompt in first_of_each(prompts(10), 2)] == [0, 1]


def answer_to_file(parallel: Parallel, folder: Path, which: list[Prompt], *, repeat: int) -> dict:
    folder.mkdir()
    file = AnswersFile(folder, rank=0)
    made = validator(parallel, which, repeat=repeat)
    extract = resolve_extract(EXACT.function)
    for answers in made.answers(Oracle()):
        file.write([answer_row(answer, decode=made.responder.decode, extract=extract) for answer in answers])
    file.close()
    return read_problems(join_answers(folder), unnamed="numbers")


def test_a_scoreboard_from_files(parallel: Parallel, tmp_path: Path) -> None:
    four = answer_to_file(parallel, tmp_path / "four", prompts(40), repeat=4)
    fewer = answer_to_file(parallel, tmp_path / "fewer", prompts(30), repeat=4)
    board = make_scoreboard({"ours": four, "before": fewer, "teacher": four}, has_votes=True)
    score = board.scores["numbers"]["ours"]
    assert (score.num_problems, score.num_answers) == (30, 120)  # those that all models answered
    assert score.accuracy.value == pytest.approx(0.625)  # even: all right, odd: one of four
    assert score.pass_at[2].value == pytest.approx((1 + 0.5) / 2)
    assert score.pass_at[4].value == 1.0
    assert score.majority.value == 0.5
    assert score.truncated_rate == pytest.approx(0.375)
    assert board.differences["numbers"]["before"].p_value == 1.0
    assert board.gap_closed == {}


def test_datasets_have_scores_and_a_total(parallel: Parallel, tmp_path: Path) -> None:
    problems = answer_to_file(parallel, tmp_path / "a", prompts(8, datasets=("even", "odd")), repeat=2)
    board = make_scoreboard({"ours": problems}, has_votes=False)
    assert {name: scores["ours"].accuracy.value for name, scores in board.scores.items()} == {
        "even": 1.0,
        "odd": 0.5,
        "total": 0.75,
    }
    assert board.scores["total"]["ours"].majority is None


def test_equal_final_answers_are_one_vote() -> None:
    extract = resolve_extract(resolve_verifier("exact"))
    assert len({extract(f"so\n#### {text}") for text in ("1,160", "1160.0", " 1160 ", "+1160")}) == 1
    assert extract("no final line") is None
    assert extract("#### x = 3") == "x=3"


def test_greedy_answers_are_not_repeated() -> None:
    config = override(Config(), {"eval.repeat": 4})
    (problem,) = [line for line in config_problems(config) if line.startswith("eval.repeat")]
    assert problem.startswith("eval.repeat=4:")
    assert "eval.temperature" in problem
    assert any(line.startswith("data.validation={}:") for line in evaluation_problems(config))
