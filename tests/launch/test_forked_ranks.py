"""Ranks that are forked from torchrun's agent behave as ranks that it starts; the ranks are small modules."""

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
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, create
from distill_cli.jobs.preflight import preflight
from distill_cli.launch import local
from distill_cli.resolved import Ranks, ResolvedRun

PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
print("imported")
agent = os.getpid()

def prepare(argv):
    print("prepared with", len(argv), threading.active_count())

def main(argv):
    rank = int(os.environ["RANK"])
"""


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return create(tmp_path / "run", command=["distill"])


@pytest.fixture
def two_ranks() -> ResolvedRun:
    return preflight(compose(["cluster.ranks_per_node=2", "cluster.gpus_per_node=0"])[0].config)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Make `body` the ranks' main function; return the end of the agent's command."""

    def make(body: str) -> list[str]:
        (tmp_path / "forked_program.py").write_text(PROGRAM + textwrap.indent(textwrap.dedent(body), "    "))
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
        torchrun = ["--fork=2", "--standalone", "--nproc-per-node=2", "-m", "forked_program", "word"]

        def command(run: RunDir, _options: Sequence[str], **_: object) -> list[str]:
            return [sys.executable, "-m", "distill_cli.launch.local", str(run.path), str(run.attempt), *torchrun]

        monkeypatch.setattr(local, "command", command)
        return torchrun

    return make


def test_ranks_share_the_agent_s_imports(
    run: RunDir, two_ranks: ResolvedRun, program: Callable[[str], list[str]], capfd: pytest.CaptureFixture
) -> None:
    program("""
        assert os.getppid() == agent and os.getsid(0) == os.getpid() and sys.argv[1:] == argv
        names = [os.environ[name] for name in ("LOCAL_RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_PORT")]
        name = Path("/proc/self/comm").read_text().strip()
        sys.stdout.write(f"{name} {threading.active_count()} {names[:2]}\\n")
        """)
    local.start_ranks(two_ranks, run)
    assert sorted(capfd.readouterr().out.splitlines()) == ["rank_0 1 ['0', '2']", "rank_1 1 ['1', '2']"]
    assert run.torchrun_log(0).read_text().count("imported") == 1
    assert "prepared with 1 1" in run.torchrun_log(0).read_text()


@pytest.mark.exhaustive
def test_killed_forked_rank_is_named(run: RunDir, two_ranks: ResolvedRun, program: Callable[[str], list[str]]) -> None:
    program("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    begin = time.monotonic()
    with pytest.raises(DistillError, match=r"rank 1 was killed by SIGKILL \(out of memory\?\); log: .*rank_1.log"):
        local.start_ranks(two_ranks, run)
    assert time.monotonic() - begin < 50


def test_failed_forked_rank_ends_the_run(
    run: RunDir, two_ranks: ResolvedRun, program: Callable[[str], list[str]]
) -> None:
    # Ranks ignore SIGTERM until they train, and torchrun gives those 30 s.
    program("""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if rank == 0:
            raise ValueError("bad")
        time.sleep(60)
        """)
    with pytest.raises(DistillError, match="torchrun ended with status 1"):
        local.start_ranks(two_ranks, run)
    assert "ValueError: bad" in run.torchrun_log(0).read_text()


def test_no_forked_rank_outlives_its_agent(tmp_path: Path, run: RunDir, program: Callable[[str], list[str]]) -> None:
    torchrun = program(f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        Path("{tmp_path}", f"started{{rank}}").touch()
        time.sleep(120)
        """)
    agent = subprocess.Popen([sys.executable, "-m", "distill_cli.launch.local", str(run.path), "1", *torchrun])
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"started{rank}").exists() for rank in (0, 1)):
        assert agent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = psutil.Process(agent.pid).children()
    assert len(ranks) == 2
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []


def test_only_ranks_on_cpus_are_forked(run: RunDir, two_ranks: ResolvedRun) -> None:
    for on_gpus in (False, True):
        script = local.LAUNCHER.script(replace(two_ranks, ranks=Ranks(1, 2, on_gpus)), folder=run.path)
        assert ("--fork=2" in script) is not on_gpus
