"""What W&B receives of a run's folder: with W&B's own client and process, and a server that is absent at times."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distill_cli.cli import run as run_command
from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import WandbConfig
from distill_cli.config.variation import config_text
from distill_cli.errors import DistillError
from distill_cli.folders.metrics_file import cut_back
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, create, read_json, write_json
from distill_cli.track.base import FILES, tracker_problems
from distill_cli.track.run_tracking import track
from distill_cli.track.shipper import ship
from distill_cli.track.wandb import WandbTracker, base_uri, has_key
from tests.track.conftest import wandb_tracker, write_rows
from tests.track.readers import recorded_values, wandb_records
from tests.track.server import free_port, wait_until
from tests.track.wandb_server import StoredRun, WandbServer, wandb_server

KEY = "planted" * 5 + "wandb"


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account of the test's own: nothing of the user's is read or written."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as started:
        yield started


def stored(server: WandbServer, run: RunDir) -> StoredRun:
    return server.runs[read_json(run.path / "wandb.json")["run_id"]]


def assert_all_there(server: WandbServer, run: RunDir) -> None:
    """Every value of metrics.jsonl once, in order, and every file that trackers get."""
    found = stored(server, run)
    assert sorted(found.values()) == recorded_values(run, "metrics.jsonl")
    assert [row["_step"] for row in found.rows] == sorted({row["_step"] for row in found.rows})
    files = [file for pattern in FILES for file in run.path.glob(pattern)]
    assert files
    for file in files:
        assert found.files[f"{run.path.name}/{file.relative_to(run.path)}"] == file.read_bytes()


def own_processes() -> list[psutil.Process]:
    """Every process that uses W&B's library for this one."""
    return [one for one in psutil.Process().children() if "distill_cli.track.wandb_process" in one.cmdline()]


def test_a_run_arrives_whole(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(5))
    tracker = wandb_tracker(run, server.url, tags=["a", "b"], notes="why", run_name="mine", group="g", log_model=True)
    ship(run, tracker, begin=True)
    write_rows(run, range(5, 8))
    run.student.mkdir()
    (run.student / "model.safetensors").write_bytes(b"weights")
    outcome = {"state": "finished", "num_steps": 7, "attempts": [{"number": 1}]}
    write_json(run.outcome, outcome)
    ship(run, tracker, end="finished")
    found = stored(server, run)
    assert_all_there(server, run)
    assert found.files[f"{run.path.name}/student/model.safetensors"] == b"weights"
    assert (found.name, found.group, found.tags, found.notes, found.exit_code) == ("mine", "g", ["a", "b"], "why", 0)
    assert found.config["loss"]["value"]["topk"] == 64
    assert found.config["facts"]["value"]["distill_run_dir"] == str(run.path)
    assert found.summary["outcome"] == outcome
    times = [json.loads(line)["time"] for line in run.metrics.read_text().splitlines()]
    assert [row["_timestamp"] for row in found.rows] == times
    assert WandbTracker(WandbConfig(uri=server.url), compose([])[0].config, run).page == (
        f"{server.url}/me/test/runs/{read_json(run.path / 'wandb.json')['run_id']}"
    )
    assert own_processes() == []


def test_a_folder_may_have_any_name(server: WandbServer, tmp_path: Path, run: RunDir) -> None:
    named = RunDir(run.path.rename(tmp_path / "runs" / "0_a=[1], *?ü"))
    write_rows(named, range(2))
    ship(named, wandb_tracker(named, server.url), end="finished")
    assert_all_there(server, named)


def test_a_refused_file_stops_nothing(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(3))
    ship(run, tracker := wandb_tracker(run, server.url), begin=True)
    before = own_processes()
    with pytest.raises(DistillError, match="gone: W&B did not take this file"):
        tracker.artifact(run.path / "gone", "gone")
    ship(run, tracker)
    assert own_processes() == before
    ship(run, tracker, end="finished")
    assert_all_there(server, run)


def test_a_damaged_folder_leaves_no_process(server: WandbServer, run: RunDir) -> None:
    (run.path / "env.json").write_text("{")
    tracker = wandb_tracker(run, server.url)
    for _ in range(2):
        with pytest.raises(ValueError, match="Expecting"):
            ship(run, tracker, end="finished")
    assert own_processes() == []


@pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("stopped", 255)])
def test_its_end_has_a_status(status: str, code: int, server: WandbServer, run: RunDir) -> None:
    ship(run, wandb_tracker(run, server.url), end=status)
    assert stored(server, run).exit_code == code


@pytest.mark.exhaustive
def test_a_resumed_run_goes_on(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(5))
    ship(run, first := wandb_tracker(run, server.url), begin=True)
    ship(run, first, end="stopped")
    cut_back(run.metrics, last_step=2, removed_to=run.path / "cut.jsonl")
    write_rows(run, range(3, 8))
    assert ship(run, again := wandb_tracker(run, server.url), begin=True) == (6, 0)
    assert stored(server, run).exit_code is None
    assert ship(run, again, end="finished") == (0, 0)
    assert_all_there(server, run)
    assert ship(run, wandb_tracker(run, server.url), end="finished") == (0, 0)
    assert len(server.runs) == 1


@pytest.mark.exhaustive
def test_a_kill_loses_no_step(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(3))
    ship(run, killed := wandb_tracker(run, server.url), begin=True)
    wait_until(lambda: len(stored(server, run).rows) == 3)
    server.refuses.set()
    write_rows(run, range(3, 6))
    assert ship(run, killed)[0] == 6  # W&B's process has them
    (process,) = own_processes()
    cores = process.children()
    process.kill()
    wait_until(lambda: not any(core.is_running() for core in cores))
    server.refuses.clear()
    write_rows(run, range(6, 7))
    with pytest.raises(DistillError, match="was killed by SIGKILL"):
        ship(run, killed)
    ship(run, wandb_tracker(run, server.url), end="finished")
    assert_all_there(server, run)


def test_a_checkpoint_identifies_the_run(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(3))
    ship(run, first := wandb_tracker(run, server.url), end="failed")
    write_json(run.trackers, {"wandb": first.identity(read_json(run.path / "wandb.json"))})
    (run.path / "wandb.json").unlink()
    assert ship(run, wandb_tracker(run, server.url), end="failed") == (0, 3)
    (run.path / "wandb.json").unlink()
    write_rows(run, range(3, 5))
    assert ship(run, wandb_tracker(run, server.url), end="finished") == (4, 3)
    assert_all_there(server, run)
    assert len(server.runs) == 1


def test_runs_of_a_sweep_are_grouped(server: WandbServer, tmp_path: Path, run: RunDir) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    elements = [Element(index, f"{index}_topk={topk}", [f"loss.topk={topk}"]) for index, topk in enumerate((8, 16))]
    sweep.write(command=["distill", "-m"], elements=elements)
    for one in elements:
        element = create(sweep.path / one.folder, command=["distill"], config=run.config.read_text())
        write_rows(element, range(2))
        ship(element, wandb_tracker(element, server.url), end="finished")
        assert_all_there(server, element)
    assert {found.group for found in server.runs.values()} == {"sweep"}
    assert sorted(found.name for found in server.runs.values()) == ["0_topk=8", "1_topk=16"]


def test_an_offline_run_is_sent_later(
    server: WandbServer, run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(run, range(4))
    (job,) = compose(["tracker=wandb", f"tracker.wandb.uri={server.url}", "tracker.wandb.mode=offline"])
    run.config.write_text(config_text(job.config))
    ship(run, WandbTracker(job.config.tracker.wandb, job.config, run), end="stopped")
    run_id = read_json(run.path / "wandb.json")["run_id"]
    (header,) = [record.run for record in wandb_records(run) if record.HasField("run")]
    assert (header.run_id, header.display_name, header.project) == (run_id, "a", "distill")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "other")  # the run has been in `distill`
    assert track([run.path]) == 0
    assert list(server.runs) == [run_id]
    assert_all_there(server, run)
    assert f"8 metrics, 3 files sent to {server.url}, run {run_id}" in capsys.readouterr().out
    assert track([run.path]) == 0
    assert "0 metrics, 0 files" in capsys.readouterr().out


def test_a_run_in_progress_sends_itself(server: WandbServer, run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(run, range(2))
    (run.logs / "rank_0.log").touch()
    with run.lock():
        assert track([run.path], overrides=["tracker=wandb", f"tracker.wandb.uri={server.url}"]) == 0
    assert "is running; send it to W&B when it has ended" in capsys.readouterr().out
    assert server.runs == {}


def test_sync_takes_keys_of_trackers(server: WandbServer, run: RunDir, uri: str) -> None:
    write_rows(run, range(2))
    words = ["tracker=wandb", f"tracker.wandb.uri={server.url}", "tracker.wandb.notes=later"]
    assert run_command(["track", "sync", str(run.path), *words]) == 0
    assert_all_there(server, run)
    assert stored(server, run).notes == "later"
    assert track([run.path], uri=uri, overrides=["tracker=mlflow"]) == 0
    assert read_json(run.path / "mlflow.json")["uri"] == uri


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["loss.topk=3"], "loss.topk: track sync takes keys of trackers alone"),
        (["tracker=wanb"], "did you mean wandb?"),
        (["tracker=[mlflow,wandb]", "--uri", "http://x"], "add one of tracker=mlflow, tracker=wandb"),
        (["tracker=tensorboard", "--uri", "http://x"], "have no address; leave it out"),
        (["tracker=wandb", "--uri", "ftp://x"], "tracker.wandb.uri: must be an address"),
    ],
)
def test_wrong_keys_are_refused(
    words: list[str], problem: str, run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["track", "sync", str(run.path), *words]) == 2
    assert problem in capsys.readouterr().err


def problems_of(*words: str) -> list[str]:
    return tracker_problems(compose(["tracker=wandb", *words])[0].config)


def test_a_key_is_needed_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert problems_of() == []
    monkeypatch.delenv("WANDB_API_KEY")
    (problem,) = problems_of()
    assert problem.startswith(
        "tracker.wandb.mode: online needs an API key for https://api.wandb.ai; type `wandb login`"
    )
    assert problems_of("tracker.wandb.mode=offline") == []
    (tmp_path / "netrc").write_text(f"machine wandb.example.com login user password {KEY}\n")
    assert problems_of("tracker.wandb.uri=https://wandb.example.com") == []
    assert not has_key("https://api.wandb.ai")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/settings").write_text("[default]\nbase_url = https://wandb.example.com\n")
    assert base_uri(WandbConfig()) == "https://wandb.example.com"
    assert problems_of() == []


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("uri=wandb.example.com", "uri: must be an address"),
        ("project=a/b", "project=a/b: must have 1 to 128 characters, and none of"),
        ("tags=[a,a]", "tags: each must be another one"),
        (f"tags=[{'a' * 65}]", "tags: each must be another one"),
    ],
)
def test_wrong_settings_are_refused(word: str, problem: str) -> None:
    (found,) = problems_of(f"tracker.wandb.{word}")
    assert found.startswith(f"tracker.wandb.{problem}")


def test_an_address_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = compose(["tracker=wandb", "tracker.wandb.uri=http://me:pa55@host"])
    for problem in (*config_problems(job.config), *tracker_problems(job.config)):
        assert problem.startswith("tracker.wandb.uri: ")
        assert "pa55" not in problem
    monkeypatch.setenv("WANDB_BASE_URL", "http://me:pa55@host")
    (problem,) = problems_of()
    assert "pa55" not in problem


@pytest.mark.parametrize(("mode", "is_wrong"), [("disabled", True), ("onlin", True), ("dryrun", False), ("run", False)])
def test_an_unusable_mode_is_refused(mode: str, is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert any(f"WANDB_MODE={mode}" in problem for problem in problems_of()) == is_wrong
    assert problems_of("tracker.wandb.mode=offline") == []


def test_keys_without_effect_are_named() -> None:
    words = ["tracker.wandb.project=x", "tracker.tensorboard.samples=1"]
    assert inert_overrides(compose(words)[0].config, words) == [
        "tracker.wandb.project has no effect without tracker.wandb.enabled",
        "tracker.tensorboard.samples has no effect without tracker.tensorboard.enabled",
    ]


def test_the_key_is_written_nowhere(server: WandbServer, run: RunDir) -> None:
    write_rows(run, range(2))
    for uri in (None, server.url):
        tracker = wandb_tracker(run, uri)
        ship(run, tracker, begin=True)
        ship(run, tracker, end="finished")
        files = [file for file in run.path.rglob("*") if file.is_file()]
        assert any(file.suffix == ".wandb" for file in files)
        assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    assert KEY not in json.dumps(stored(server, run).config)


def test_variables_make_no_other_run(server: WandbServer, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a shell or an agent in which W&B already follows something else."""
    other = {"RUN_ID": "other", "RESUME": "must", "SWEEP_ID": "s", "SERVICE": "3-1-unix-/nowhere", "DIR": "/proc"}
    for name, value in other.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    write_rows(run, range(2))
    ship(run, wandb_tracker(run, server.url), end="finished")
    assert_all_there(server, run)
    assert len(server.runs) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["absent", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("silent", "refusing"))]
)
def test_no_server_stops_a_run(kind: str, server: WandbServer, run: RunDir) -> None:
    """A run that is stopped while W&B does not answer: a warning, no process is left, and the rest can be sent."""
    uri = f"http://127.0.0.1:{free_port()}" if kind == "absent" else server.url
    (server.silent if kind == "silent" else server.refuses).set()
    code = f"""
import contextlib, pathlib, time
from distill_cli.errors import Stopped
from distill_cli.folders.run_dir import RunDir
from distill_cli.track.run_tracking import following
from tests.track.conftest import wandb_tracker, write_rows
run = RunDir(pathlib.Path({str(run.path)!r}))
with contextlib.suppress(Stopped), following(run, [wandb_tracker(run, {uri!r})]):
    write_rows(run, range(3))
    while not (run.path / "wandb").is_dir():  # W&B's process is about to connect
        time.sleep(0.1)
    raise Stopped(15)
"""
    marked = {"DISTILL_TEST": uuid.uuid4().hex}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | marked, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b"lacks some of the run; distill track sync" in done.stderr
    wait_until(lambda: not with_variable(marked))
    sync = ["track", "sync", str(run.path), "tracker=wandb", f"tracker.wandb.uri={uri}", "tracker.wandb.project=test"]
    assert run_command(sync) == 1
    assert own_processes() == []
    if kind == "refusing":
        server.refuses.clear()
        assert run_command(sync) == 0
        assert_all_there(server, run)


def with_variable(variables: dict[str, str]) -> list[psutil.Process]:
    """Every process whose environment has these variables."""
    found = []
    for process in psutil.process_iter():
        try:
            if variables.items() <= process.environ().items():
                found.append(process)
        except psutil.Error:  # another user's, or it has ended
            continue
    return found
