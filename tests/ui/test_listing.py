"""What the list has: each run once, whatever is in its folder, and nothing from elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest

from distill_cli.ui.app import run_names
from distill_cli.ui.listing import READING, Line, Listing
from distill_cli.ui.pages import state_line
from tests.report.made import make_run
from tests.ui.serving import CONFIG, append, make_running, make_sweep


def lines_of(root: Path) -> dict[str, Line]:
    return {line.name: line for line in Listing(root).lines()}


def test_every_run_is_listed_once(tmp_path: Path) -> None:
    make_run(tmp_path / "one", config=CONFIG, recorded=())
    make_run(tmp_path / "project/nested/two", config=CONFIG, recorded=())
    make_sweep(tmp_path / "sweep", (0.3, 0.5, 0.7), finished=2)
    (tmp_path / "latest").symlink_to("one")
    (tmp_path / ".one.tmp").mkdir()
    shutil.copytree(tmp_path / "one", tmp_path / "mlartifacts/1/artifacts")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/config.yaml").write_text(CONFIG)
    lines = lines_of(tmp_path)
    runs = [f"sweep/{index}_kl_weight={value}" for index, value in enumerate((0.3, 0.5, 0.7))]
    assert list(lines) == ["one", "project/nested/two", "sweep", *runs]
    assert lines["sweep"].is_sweep
    assert lines["sweep"].keys == ("loss.kl_weight",)
    assert [lines[run].state for run in runs] == ["finished", "finished", "waiting"]
    assert [lines[run].title for run in runs] == ["kl_weight=0.3", "kl_weight=0.5", "kl_weight=0.7"]
    assert [lines[run].has_page for run in runs] == [True, True, False]
    assert not any(line.problem for line in lines.values())


def test_line_has_the_facts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config=CONFIG, recorded=())
    (run.path / "env.json").write_text('{"started": "2026-11-30T07:25:50+0100"}')
    (line,) = lines_of(tmp_path).values()
    assert (line.student, line.teacher, line.loss, line.state) == ("pupil", "master", "mixed", "finished")
    assert (line.before, line.goal, line.step, line.lasted) == (0.3, 0.95, 20, 3723.0)
    assert line.after is not None
    assert 0.9 < line.after < 0.95
    assert line.kl is not None
    assert line.began == 1796019950.0


def test_running_run_has_time_left(tmp_path: Path) -> None:
    run = make_running(tmp_path / "run", recorded=())
    (line,) = lines_of(tmp_path).values()
    assert (line.state, line.stage, line.step, line.num_steps, line.left) == ("running", "sample", 12, 40, 28.0)
    assert state_line(line).startswith("running, step 12 of 40, sample")
    assert state_line(line).endswith("about 0:28 left")
    (run.path / ".lock").write_text("")
    (line,) = lines_of(tmp_path).values()
    assert (line.state, line.stage, line.left) == ("failed", "", None)


def test_unchanged_runs_are_not_read_again(tmp_path: Path) -> None:
    run, listing = make_running(tmp_path / "run", recorded=()), Listing(tmp_path)
    make_run(tmp_path / "other", config=CONFIG, recorded=())
    make_run(tmp_path / "zero", config="[", recorded=())
    before = listing.lines()
    assert before[2].problem
    assert all(old is new for old, new in zip(before, listing.lines(), strict=True))
    append(run, 13)
    other, changed, _ = listing.lines()
    assert other is before[0]
    assert changed.step == 13
    run.beat("train 40")
    assert listing.lines()[1].stage == "train"
    shutil.rmtree(run.path)
    assert listing.lines() == [other, before[2]]


def test_list_does_not_wait_for_all(tmp_path: Path) -> None:
    for number in range(3):
        make_run(tmp_path / f"run{number}", config=CONFIG, recorded=(), num_steps=1)
    listing = Listing(tmp_path)
    assert [line.state for line in listing.lines(within_s=0)] == ["finished", READING, READING]
    assert [line.state for line in listing.lines(within_s=0)] == ["finished", "finished", READING]
    assert [line.state for line in listing.lines()] == ["finished"] * 3
    assert [line.state for line in listing.lines(within_s=0)] == ["finished"] * 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", '{"step": 0}\nnonsense\n{"step": 1, "time": 1}\n'),
        ("metrics.jsonl", '{"step": "many"}\n'),
        ("metrics.jsonl", "[]\n"),
        ("metrics.jsonl", '{"time": 1}\n'),
        ("metrics.jsonl", '{"step": 1, "time": 1e308}\n{"step": 2, "time": -1e308}\n'),
        ("outcome.json", "{"),
        ("outcome.json", "[]"),
        ("outcome.json", '{"state": "finished", "seconds": NaN}'),
        ("outcome.json", '{"state": "finished", "seconds": "long"}'),
        ("config.yaml", "loss: [\n"),
        ("config.yaml", "[" * 20_000),
        ("config.yaml", "\x00\x01"),
    ],
)
def test_damaged_run_has_its_reason(tmp_path: Path, file: str, content: str) -> None:
    make_run(tmp_path / "good", config=CONFIG, recorded=())
    run = make_running(tmp_path / "run", recorded=())
    (run.path / file).write_text(content)
    lines = lines_of(tmp_path)
    assert lines["good"].state == "finished"
    assert lines["run"].problem
    assert not lines["run"].has_page


@pytest.mark.parametrize("cut", ['{"st', '{"step": 13, "time": 13.0'])
def test_half_written_row_is_left_out(tmp_path: Path, cut: str) -> None:
    run = make_running(tmp_path / "run", recorded=())
    with run.metrics.open("a") as file:
        file.write(cut)
    assert lines_of(tmp_path)["run"].step == 12


def test_links_elsewhere_are_not_read(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    secret = make_run(tmp_path / "secret", config=CONFIG, recorded=())
    run = make_run(root / "run", config=CONFIG, recorded=())
    run.metrics.unlink()
    run.metrics.symlink_to(secret.metrics)
    (root / "linked").symlink_to(secret.path)
    listing = Listing(root)
    (line,) = listing.lines()
    assert (line.name, line.problem) == ("run", "metrics.jsonl is a link to another place")
    for name in ("run", "linked", "../secret", str(secret.path), "run/../run", "./run", "", "..", "run/", "\0"):
        assert listing.find(name) is None
    run.metrics.unlink()
    shutil.copy(secret.metrics, run.metrics)
    assert listing.find("run")
    shutil.rmtree(run.path)
    run.path.symlink_to(secret.path)
    assert listing.find("run") is None


@pytest.mark.parametrize("folder", ["../secret", "..", "", "a/b", 7, "link"])
def test_sweep_names_no_other_folders(tmp_path: Path, folder: object) -> None:
    make_run(tmp_path / "secret", config=CONFIG, recorded=())
    sweep = tmp_path / "runs/sweep"
    sweep.mkdir(parents=True)
    (sweep / "link").symlink_to(tmp_path / "secret")
    elements = [{"index": 0, "folder": folder, "overrides": ["loss.topk=1"]}]
    (sweep / "sweep.json").write_text(json.dumps({"command": [], "elements": elements}))
    (line,) = Listing(tmp_path / "runs").lines()
    assert line.problem
    assert Listing(tmp_path / "runs").find("sweep") is None


def test_root_may_be_a_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", config=CONFIG, recorded=())
    (tmp_path / "latest").symlink_to("run")
    listing = Listing(tmp_path / "latest")
    (line,) = listing.lines()
    assert (line.name, line.title) == (".", "run")
    assert listing.find(".")


def test_any_name_finds_its_run(tmp_path: Path) -> None:
    names = ["a b+c&d=e#f?g%2Fh", "naïve", os.fsdecode(b"\xff\xfe"), "<img src=x onerror=alert(1)>", "日本"]
    for name in names:
        make_run(tmp_path / name, config=CONFIG, recorded=(), num_steps=1)
    listing = Listing(tmp_path)
    for line in listing.lines():
        assert run_names(line.query) == [line.name]
        assert listing.find(line.name)
    assert {line.name for line in listing.lines()} == set(names)
