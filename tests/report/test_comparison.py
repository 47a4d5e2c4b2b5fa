"""The comparison of runs, from folders as runs leave them."""

import io
import itertools
import json
from pathlib import Path

import pytest
from rich.console import Console

from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, element_name, write_json
from distill_cli.report.comparison import print_comparison
from distill_cli.report.read import last_values, read_results


def make_run(folder: Path, rows: list[dict], *, state: str | None = "finished", topk: int = 1) -> None:
    folder.mkdir(parents=True)
    run = RunDir(folder)
    run.config.write_text(f"loss: {{topk: {topk}}}\n")
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if state:
        write_json(run.outcome, {"state": state})


def measures(kl: float, accuracy: float) -> dict:
    return {"train/kl_forward": kl, "train/kl_reverse": 2 * kl, "train/loss": 3 * kl, "val/accuracy": accuracy}


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Three top-k by three weights; every run has different last values."""
    pairs = list(itertools.product((32, 64, 128), (0.3, 0.5, 0.7)))
    swept = [[f"loss.topk={topk}", f"loss.kl_weight={weight}"] for topk, weight in pairs]
    elements = [Element(index, element_name(index, words), words) for index, words in enumerate(swept)]
    sweep = SweepDir(tmp_path / "sweep")
    sweep.write(command=["distill", "-m"], elements=elements)
    for element in elements:
        rows = [{"step": 0, "val/accuracy": 0.1}, {"step": 1, **measures(9.0, 0.2)}]
        rows.append({"step": 2, **measures(0.01 * (1 + element.index), 0.90 + 0.01 * element.index)})
        make_run(sweep.path / element.folder, rows)
    return sweep.path


def printed(*paths: Path) -> str:
    console = Console(file=io.StringIO(), highlight=False, width=80)
    print_comparison(console, read_results(list(paths)))
    return console.file.getvalue()


def test_two_keys_make_a_matrix(grid: Path) -> None:
    lines = [line.split() for line in printed(grid).splitlines()]
    begin = lines.index(["KL", "forward", "(train/kl_forward)"])
    assert lines[begin + 1 : begin + 5] == [
        ["loss.topk", "\\", "loss.kl_weight", "0.3", "0.5", "0.7"],
        ["32", "0.01", "0.02", "0.03"],
        ["64", "0.04", "0.05", "0.06"],
        ["128", "0.07", "0.08", "0.09"],
    ]
    begin = lines.index(["accuracy", "(val/accuracy)"])
    assert lines[begin + 3] == ["64", "93.0%", "94.0%", "95.0%"]
    assert ["best", "KL", "forward", "0.01", "loss.topk=32", "loss.kl_weight=0.3"] in lines
    assert ["best", "accuracy", "98.0%", "loss.topk=128", "loss.kl_weight=0.7"] in lines


def test_unfinished_runs_are_marked(grid: Path) -> None:
    folders = sorted(folder for folder in grid.iterdir() if folder.is_dir())
    (folders[8] / "outcome.json").unlink()  # failed: nobody holds it
    (folders[7] / "outcome.json").unlink()
    (folders[7] / ".lock").write_text("process 1 on elsewhere")
    for file in folders[6].iterdir():
        file.unlink()
    text = printed(grid)
    assert "98.0%*" in text
    assert "97.0%*" in text
    assert "best accuracy    95.0%" in text
    assert f"{folders[6].name} (waiting), {folders[7].name} (running), {folders[8].name} (failed)" in text


def test_other_runs_are_rows(tmp_path: Path) -> None:
    make_run(tmp_path / "a", [{"step": 0, "val/accuracy": 0.9}, {"step": 1, "train/loss": 0.5}])
    make_run(tmp_path / "b", [], state=None, topk=2)
    lines = [line.split() for line in printed(tmp_path / "a", tmp_path / "b").splitlines()]
    assert lines[:3] == [
        ["loss.topk", "state", "step", "loss"],
        ["1", "finished", "1", "0.5"],  # the accuracy of step 0 is the student's before training
        ["2", "failed", "0", "failed"],
    ]


def test_folder_without_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a run .* nor a sweep"):
        read_results([tmp_path])
    with pytest.raises(ConfigError, match="no such folder"):
        read_results([tmp_path / "none"])


def test_last_values_are_read_backwards(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "a": step, "long": "x" * 997} for step in range(200)]
    rows[3]["seldom"] = 7
    rows[150]["b"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "a": 2')
    assert last_values(file, ["a", "seldom", "b"]) == {"a": 199, "seldom": 7}
    assert last_values(tmp_path / "none", ["a"]) == {}
