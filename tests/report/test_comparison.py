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
from distill_cli.report.read import last_values, read_results, totals


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


def test_totals_are_sums_over_steps(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "train/tokens": 10 * step, "train/tokens_2": 1.5} for step in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "train/tokens": 3')
    assert totals(file, ["train/tokens", "train/tokens_2", "train"]) == {"train/tokens": 30, "train/tokens_2": 3}
    assert totals(tmp_path / "none", ["train/tokens"]) == {}


def make_sweep(folder: Path, values: dict[tuple[str, ...], tuple[float, float] | None]) -> Path:
    """A sweep with a run for each of these overrides, with its final KL and accuracy; None has not finished."""
    elements = [Element(index, element_name(index, words), list(words)) for index, words in enumerate(values)]
    sweep = SweepDir(folder)
    sweep.write(command=["distill", "-m"], elements=elements)
    for element, value in zip(elements, values.values(), strict=True):
        rows = [{"step": step, **measures(*(value or (9.0, 0.5))), "train/response_tokens": 700} for step in (1, 2)]
        make_run(sweep.path / element.folder, rows, state="finished" if value else None)
    return sweep.path


def test_seeds_are_one_row(tmp_path: Path) -> None:
    values = {
        ("loss=forward", "train.seed=1"): (0.010, 0.90),
        ("loss=forward", "train.seed=2"): (0.012, 0.92),
        ("loss=reverse", "train.seed=1"): (0.500, 0.91),
        ("loss=reverse", "train.seed=2"): (0.502, 0.91),
    }
    text = printed(make_sweep(tmp_path / "sweep", values))
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["loss", "seeds", "step", "accuracy", "KL", "forward", "KL", "reverse", "loss", "tokens"]
    # 12.706 x 0.0014142 / sqrt(2) = 0.0127, and for the accuracies 12.706 x 0.014142 / sqrt(2) = 12.7%
    kl, reverse, loss = (["0.011", "±", "0.013"], ["0.022", "±", "0.025"], ["0.033", "±", "0.038"])
    assert lines[1] == ["forward", "2", "2", "91.0%", "±", "12.7%", *kl, *reverse, *loss, "1,400", "±", "0"]
    assert lines[2][:9] == ["reverse", "2", "2", "91.0%", "±", "0.0%", "≈", "0.501", "±"]
    assert "best accuracy    91.0% ± 12.7%  loss=forward; 1 more within its interval (≈)" in text
    assert "best KL forward  0.011 ± 0.013  loss=forward\n" in text
    assert "best loss" not in text  # two losses are no two values of one
    assert "≈ within the interval of the best" in text
    assert "Student's t" in text


def test_seeds_leave_a_matrix(tmp_path: Path) -> None:
    values = {
        (f"loss.topk={topk}", f"train.lr={lr}", f"train.seed={seed}"): (topk * lr * seed, 0.9)
        for topk in (8, 16)
        for lr in (1, 2)
        for seed in (1, 2)
    }
    lines = [line.split() for line in printed(make_sweep(tmp_path / "sweep", values)).splitlines()]
    begin = lines.index(["KL", "forward", "(train/kl_forward)"])
    assert lines[begin + 1] == ["loss.topk", "\\", "train.lr", "1", "2"]
    assert [cell for cell in lines[begin + 3] if cell[0].isdigit()] == ["16", "24", "102", "48", "203"]


def test_unfinished_seeds_are_left_out(tmp_path: Path) -> None:
    values = {
        ("train.lr=1", "train.seed=1"): (0.010, 0.90),
        ("train.lr=1", "train.seed=2"): (0.012, 0.92),
        ("train.lr=1", "train.seed=3"): None,
        ("train.lr=2", "train.seed=1"): (0.020, 0.80),
    }
    text = printed(make_sweep(tmp_path / "sweep", values))
    lines = text.splitlines()
    assert lines[1].split()[:8] == ["1", "2", "finished,", "1", "failed", "2", "2", "91.0%"]
    assert "12.7%*" in lines[1]
    assert "best accuracy    80.0%  train.lr=2" in text
    assert "seed=3 (failed)" in text


def test_equal_seeds_have_no_interval(tmp_path: Path) -> None:
    values = {(f"train.seed={seed}",): (0.01, 0.9) for seed in (1, 2, 3)}
    text = printed(make_sweep(tmp_path / "sweep", values))
    assert text.splitlines()[1].split() == ["3", "seeds", "3", "2", "90.0%", "0.01", "0.02", "0.03", "1,400"]
    assert "no interval for 3 seeds: 3 runs have the same values" in text
    assert "±" not in text


def test_wide_tables_are_whole_in_files(tmp_path: Path) -> None:
    """Output to a file has no width: no digit may be cut."""
    keys = ("a_rather_long_section.with_a_long_key", "another_long_section.with_a_long_key", "train.seed")
    values = {tuple(f"{key}={seed}" for key in keys): (0.0123456 * seed, 0.9) for seed in (1, 2)}
    text = printed(make_sweep(tmp_path / "sweep", values))
    assert "…" not in text
    assert all(key in text.splitlines()[0] for key in keys)
    assert text.splitlines()[2].split()[-4:] == ["0.02469", "0.04938", "0.07407", "1,400"]
