"""`distill eval` as a user types it, on the run that the other tests look at."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.end_to_end.conftest import Finished, distill, refused

pytestmark = pytest.mark.slow


def test_before_after_and_teacher_at_once(one_rank: Finished) -> None:
    asked = ("eval.max_samples=40", "eval.repeat=2", "eval.temperature=0.5")
    done = distill(one_rank.folder, "eval", "runs/latest", "--against", "before", "teacher", "--json", *asked)
    assert done.status == 0, done.stderr
    result = json.loads(done.stdout)
    ours = one_rank.run.path.name
    assert list(result["models"]) == [ours, "before", "teacher"]
    scores = result["scores"]["arithmetic"]
    assert scores["teacher"]["accuracy"]["value"] > 0.9 > scores["before"]["accuracy"]["value"]
    for score in scores.values():
        assert (score["num_problems"], score["num_answers"]) == (40, 80)
        assert score["accuracy"]["low"] <= score["accuracy"]["value"] <= score["accuracy"]["high"]
        assert score["pass_at"]["2"]["value"] >= score["accuracy"]["value"]
        assert score["truncated_rate"] <= 1
    gained = result["differences"]["arithmetic"]["before"]["estimate"]["value"]
    gap = scores["teacher"]["accuracy"]["value"] - scores["before"]["accuracy"]["value"]
    assert result["gap_closed"]["arithmetic"]["value"] == pytest.approx(gained / gap)
    folder = Path(result["folder"])
    assert folder.parent == one_rank.run.evals
    assert json.loads((folder / "results.json").read_text()) == result
    rows = pyarrow.parquet.read_table(folder / "teacher" / "answers.parquet").to_pylist()
    assert len(rows) == 80
    assert all(row["final_answer"] == row["reference"] for row in rows if row["reward"] == 1)


@pytest.mark.exhaustive
def test_greedy_eval_equals_validation(one_rank: Finished, tmp_path: Path) -> None:
    """The run validated its last step on 40 prompts."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(one_rank.run.path, unfinished, ignore=shutil.ignore_patterns("evals"))
    (unfinished / "outcome.json").unlink()
    done = distill(tmp_path, "eval", "unfinished", "cluster.ranks_per_node=2", "eval.batch_size=8")
    assert done.status == 0, done.stderr
    assert "exporting the student of step 3" in done.stdout
    (result,) = unfinished.glob("evals/*/results.json")
    score = json.loads(result.read_text())["scores"]["arithmetic"]["unfinished"]
    after = json.loads(one_rank.run.outcome.read_text())["after"]
    assert score["accuracy"]["value"] == pytest.approx(after["accuracy"])
    assert score["mean_length"] == pytest.approx(after["mean_length"])
    assert f"{score['accuracy']['value']:.1%}" in done.stdout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "are required: RUN|MODEL"),
        (["runs/latest", "--against"], "--against: expected at least one"),
        (["runs/latest", "--step", "x"], "must be the number of a step, best or last"),
        (["runs/latest", "train.lr=1"], "train.lr=1: an evaluation does not read it"),
        (["runs/latest", "eval.repeet=2"], "did you mean eval.repeat?"),
        (["runs/latest", "eval.repeat=2"], "greedy answers are all the same"),
        (["runs/latest", "--step", "2"], "no checkpoint 2"),
        (["runs/latest", "--against", "/nowhere"], "/nowhere: no such folder"),
        (
            ["runs/latest", "data=jsonl", "data.validation.path=/nowhere"],
            "data.validation.path=/nowhere: cannot be read",
        ),
        (["runs/latest", "data.validation.split=none"], "split=none: must be one of"),
        (["runs/latest", "eval.max_new_tokens=4000"], "positions, and prompt and answer may take"),
        (["/nowhere"], "/nowhere: no benchmark is given; choose one with data="),
        (["/nowhere", "data=arithmetic"], "/nowhere: no such folder"),
        (["/nowhere", "--against", "teacher", "data=arithmetic"], "--against before, teacher: are models of a run"),
        (["package://tiny_pair/student", "cluster.gpus_per_node=99"], "visible GPUs"),
    ],
)
def test_impossible_evaluations_are_refused(
    one_rank: Finished, argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert message in "\n".join(refused(one_rank.folder, monkeypatch, capsys, "eval", *argv))
