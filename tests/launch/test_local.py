"""The launcher names ranks that failed, and leaves nothing behind; the ranks are small scripts."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError, DistillError, Killed, Unrecoverable
from distill_cli.folders.run_dir import RunDir, create
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.run_panels import cores_row
from distill_cli.launch import local
from distill_cli.machine import hardware
from distill_cli.resolved import Ranks, ResolvedRun


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create(tmp_path / "run", command=["distill"])


def resolved_of(*overrides: str) -> ResolvedRun:
    return preflight(compose(overrides)[0].config)


def script_command(tmp_path: Path, body: str) -> Callable[..., list[str]]:
    """torchrun on a script in place of the worker."""
    script = tmp_path / "rank.py"
    script.write_text("import os, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n" + body)

    def command(run: RunDir, _options: Sequence[str], *, num_ranks: int, **_: object) -> list[str]:
        return [sys.executable, "-m", "distill_cli.launch.local", str(run.path), str(run.attempt), "--standalone",
                f"--nproc-per-node={num_ranks}", str(script), str(run.path)]  # fmt: skip

    return command


def test_killed_ranks_name_their_signal(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import signal\nos.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)"
    monkeypatch.setattr(local, "command", script_command(tmp_path, body))
    begin = time.monotonic()
    with pytest.raises(DistillError, match=r"rank 1 was killed by SIGKILL \(out of memory\?\); log: .*rank_1.log"):
        local.start_ranks(resolved_of("cluster.ranks_per_node=2"), run)
    assert time.monotonic() - begin < 50


def test_the_first_failed_rank_is_named(run: RunDir) -> None:
    run.rank_error(0).write_text(json.dumps({"time": 2.0, "message": "connection closed by peer"}))
    run.rank_error(1).write_text(json.dumps({"time": 1.0, "message": "ValueError: bad"}))
    assert str(local.failure(run, status=1)) == f"rank 1: ValueError: bad; log: {run.rank_log(1)}"


def test_of_ranks_with_the_same_error_the_lowest_is_named(run: RunDir) -> None:
    for rank, time_s in enumerate((3.0, 2.0, 1.0)):
        message = "another" if rank == 0 else "ValueError: bad"
        run.rank_error(rank).write_text(json.dumps({"time": time_s, "message": message}))
    assert str(local.failure(run, status=1)) == f"rank 1: ValueError: bad; log: {run.rank_log(1)}"


def test_cpu_ranks_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    resolved = resolved_of("cluster.gpus_per_node=0")
    for on_gpus, devices in ((False, ""), (True, "0,1")):
        env = local.environment(replace(resolved, ranks=Ranks(1, 2, on_gpus)))
        assert env["CUDA_VISIBLE_DEVICES"] == devices


def test_bytecode_is_kept_if_packages_have_none(tmp_path: Path) -> None:
    code = "import sys; sys.pycache_prefix = sys.argv[1]; from distill_cli.launch.local import bytecode_variables; "
    code += "print(sorted(bytecode_variables().values()))"
    cached = tmp_path / str(importlib.util.find_spec("torch").origin).lstrip("/")
    cached = cached.with_name(f"__init__.{sys.implementation.cache_tag}.pyc")
    kept = ["", str(tmp_path / "distill/bytecode")]
    for has_bytecode, writes, expected in ((False, False, kept), (False, True, []), (True, False, [])):
        if has_bytecode:
            cached.parent.mkdir(parents=True)
            cached.touch()
        env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "" if writes else "1"}
        argv = [sys.executable, "-c", code, str(tmp_path)]
        found = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == str(expected)


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.exhaustive), signal.SIGKILL]
)
def test_no_process_outlives_the_launcher(tmp_path: Path, signum: signal.Signals) -> None:
    """Even if a rank ignores SIGTERM, or the launcher itself is killed."""
    mark = tmp_path / "started"
    (tmp_path / "rank.py").write_text(
        textwrap.dedent(f"""
        import os, signal, time
        from pathlib import Path
        from distill_cli.machine.processes import die_with_parent
        die_with_parent()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path("{mark}" + os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(120)
        """)
    )
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from distill_cli.config.compose import compose
        from distill_cli.errors import Stopped
        from distill_cli.launch import local
        from distill_cli.folders.run_dir import create
        from distill_cli.jobs.preflight import preflight
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        local.command = lambda run, options, **_: [*agent, "--nproc-per-node=2", "{tmp_path / "rank.py"}"]
        try:
            resolved = preflight(compose(["cluster.ranks_per_node=2"])[0].config)
            local.start_ranks(resolved, create(Path("{tmp_path}/run"), command=[]))
        except Stopped as stopped:
            sys.exit(128 + stopped.signum)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(launcher)],
        cwd=Path(__file__).parent.parent.parent,
    )
    marks = [Path(f"{mark}{rank}") for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in marks):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    begin = time.monotonic()
    os.kill(process.pid, signum)
    process.wait(30)
    assert process.returncode == (-signal.SIGKILL if signum == signal.SIGKILL else 128 + signum)
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in tree):
        assert time.monotonic() - begin < 30
        time.sleep(0.1)


def test_orphans_end_at_their_start() -> None:
    code = "from distill_cli.machine.processes import die_with_parent; die_with_parent(parent={}); print('lives')"
    for parent, printed in ((os.getpid(), "lives\n"), (os.getppid(), "")):
        done = subprocess.run([sys.executable, "-c", code.format(parent)], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == (printed, 0 if printed else 1)


def test_ranks_that_hang_are_ended(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "command", script_command(tmp_path, "time.sleep(120)"))
    with pytest.raises(Killed, match=r"hang_timeout_s=3 s and are taken for hung; log: .*rank_0.log"):
        local.start_ranks(resolved_of("cluster.hang_timeout_s=3"), run)


def test_errors_keep_their_kind(run: RunDir) -> None:
    for kind in (ConfigError, Unrecoverable, Killed):
        run.rank_error(0).write_text(json.dumps({"time": 1.0, "message": "so", "kind": kind.__name__}))
        assert type(local.failure(run, status=1)) is kind


def test_more_threads_than_cores_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    resolved = replace(resolved_of(), ranks=Ranks(1, 2, False))
    assert local.environment(resolved)["OMP_NUM_THREADS"] == str(max(1, hardware.cores() // 2))
    chosen = replace(resolved_of("+cluster.env.OMP_NUM_THREADS=64"), ranks=Ranks(1, 2, False))
    assert local.environment(chosen)["OMP_NUM_THREADS"] == "64"
    assert "64 threads each" in cores_row(chosen)
