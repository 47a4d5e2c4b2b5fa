"""One process at a time holds a folder: on this machine, on another, and without locks in the file system."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_cli.errors import ConfigError
from distill_cli.folders import lock
from distill_cli.folders.lock import hold


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SIGN_S", 0.05)
    monkeypatch.setattr(lock, "WATCH_S", 1.0)


def test_a_local_holder_is_named(file: Path) -> None:
    with hold(file), pytest.raises(ConfigError, match=f"process {os.getpid()} on "), hold(file):
        pass
    assert file.read_text() == ""
    with hold(file):
        pass


def test_a_killed_holder_leaves_no_lock(file: Path) -> None:
    code = "import os, sys; from pathlib import Path; from distill_cli.folders.lock import hold\n"
    code += "with hold(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert file.read_text().startswith("process ")
    with hold(file):
        pass


@pytest.fixture
def other_machine(file: Path, quick: None) -> Iterator[threading.Event]:
    """Another machine's process holds the lock, unknown to flock; it dies when the event is set."""
    file.write_text("process 7 on elsewhere")
    died = threading.Event()
    thread = threading.Thread(target=lock.give_signs, args=(file, died))
    thread.start()
    yield died
    died.set()
    thread.join()


def test_signs_of_life_keep_the_lock(file: Path, other_machine: threading.Event) -> None:
    with pytest.raises(ConfigError, match="process 7 on elsewhere"), hold(file):
        pass
    assert file.read_text() == "process 7 on elsewhere"
    other_machine.set()
    with hold(file):
        assert file.read_text().startswith(f"process {os.getpid()}")


def test_signs_of_life_replace_flock(
    file: Path, other_machine: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match="process 7 on elsewhere"), hold(file):
        pass
    assert "has no locks (Function not implemented)" in caplog.text
