"""What a user types wrong: status 2, one line each with what is wrong and what to do, and no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.cli import run
from distill_cli.config.compose import compose
from distill_cli.config.variation import config_text
from distill_cli.terminal.console import READER_GONE
from distill_cli.verbs.command_line import VERBS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / "config.yaml").write_text("{{")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("plan check", "a verb comes first, and there is one"),
        ("--cfg nosuch", "choose from 'job', 'hydra', 'all'"),
        ("--cfg job --info", "--info/-i: not allowed with argument --cfg"),
        ("--resolve", "is for --cfg"),
        ("trian", "did you mean train?"),
        ("=3", "unknown key"),
        ("lss=mixed", "did you mean loss?"),
        ("train.lr=1e-3,1e-4", "add -m"),
        ("train.lr=interval(1e-5,1e-3)", "search.trials=N"),
        ("-m train.lr=interval(1e-5,1e-3)", "search.trials=N"),
        ("plan -m train.lr=interval(1e-5,1e-3) search.trials=2", "distill train -m"),
        ("plan -m train.lr=1e-3,1e-4 search.trials=2", "search.trials=2: nothing is searched here"),
        ("-m loss.topk=4,8 hydra/launcher=submitit_slurm", "cluster=slurm"),
        ("-m loss.topk=4,8 hydra/sweeper=optuna", "search.trials=N"),
        ("data=table", "data.train.path: a value is needed"),
        ("-m data=table,jsonl", "data.train.path: a value is needed"),
        ("model.student.path=", "is empty"),
        ("model.student.path=empty", "config.json: No such file or directory"),
        ("run.name=", "give one without /"),
        ("run.name=a/b", "give one without /"),
        ("run.root=", "is empty"),
        ("run.root=file", "is a file; give a folder"),
        ("plan --measure cluster=slurm", "cluster=local"),
        ("plan --measure -m train.lr=1e-3,1e-4", "leave -m out"),
        ("plan --measure loss.topk=0", "must be at least 1"),
        *((f"{verb} torn", "cannot be read as a run's config") for verb in ("watch", "report", "resume", "track sync")),
        *((f"{verb} empty", "give") for verb in ("watch", "report", "resume", "export", "track sync")),
        *((f"{verb} nothing", "no such folder") for verb in ("watch", "report", "resume", "export", "track sync")),
        *((verb, "distill") for verb in ("watch", "report", "resume", "export", "eval", "track")),
        ("ls nosuch", "there are: checkpoint"),
        ("ls loss=nosuch", "loss=nosuch: no such choice"),
        *((f"{verb} --foo", f"--foo: distill {verb} has no such flag") for verb in VERBS),
        *((f"{verb} runs/x --step -1", "-1: distill") for verb in ("resume", "eval", "export")),
        *((f"{verb} runs/x --step", "--step: expected one argument") for verb in ("resume", "eval", "export")),
        *((f"{verb} loss.topk=4", "give one RUN") for verb in ("resume", "replay", "eval")),
        *((f"{verb} nothing s/0_topk=4", "give one RUN") for verb in ("resume", "replay", "eval")),
        ("resume s/0_topk=4", "s/0_topk=4: no such folder"),
        ("eval empty --against", "--against: expected at least one argument"),
        ("eval empty --against eval.repeat=4", "--against eval.repeat=4: is an override"),
        ("export empty out another", "another: one word too many"),
        ("export empty --push=", "--push: a value is needed"),
        ("export empty --max-shard-size 5XB", "--max-shard-size 5XB: must be a size"),
        ("report empty --out", "--out: expected one argument"),
        ("track send empty", "'send' (choose from 'sync')"),
        ("track sync empty --uri ftp://x", "neither a run"),
        ("watch empty torn", "torn: one word too many"),
        ("ls loss data", "data: one word too many"),
        ("doctor --jsn", "did you mean --json?"),
        ("doctor now", "now: one word too many"),
    ],
)
def test_a_mistake_is_one_line(typed: str, expected: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    before = files(folder)
    assert run(typed.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert 1 <= len(err.splitlines()) <= 2
    assert all(line.startswith("error: ") for line in err.splitlines())
    assert files(folder) == before


def files(folder: Path) -> list[Path]:
    """Return the files in a folder, except the lock that `resume` takes."""
    return sorted(path for path in folder.rglob("*") if path.name != ".lock")


def test_damaged_metrics_are_named(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "torn/config.yaml").write_text(config_text(compose([])[0].config))
    (folder / "torn/metrics.jsonl").write_text("garbage\n")
    for verb in ("watch", "report"):
        assert run([verb, "torn"]) == 1
        assert "metrics.jsonl: holds a line that is no row of metrics" in capsys.readouterr().err


@pytest.mark.parametrize("typed", ["ls", "plan", "--info"])
def test_a_closed_pipe_ends_quietly(typed: str) -> None:
    """As after `| head`, which closes the pipe before anything is written."""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "distill_cli", *typed.split()]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writes)
    assert done.stderr == ""
    assert done.returncode in (READER_GONE, -13)  # the second by the signal itself
