"""The command: what it prints, when it opens a browser, how it ends."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from distill_cli.ui.server import has_display
from tests.ui.serving import serving

COMMAND = [sys.executable, "-m", "distill_cli", "ui", "--port", "0"]


def test_browser_is_opened_on_terminals(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "opened")
    (tmp_path / "browser").write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/opened\n')
    (tmp_path / "browser").chmod(0o755)
    ours, terminal = pty.openpty()
    env = {**os.environ, "BROWSER": f"{tmp_path}/browser %s"}
    with subprocess.Popen(COMMAND, cwd=tmp_path, stdout=terminal, env=env) as process:
        opened = (tmp_path / "opened").read_text().strip()
        process.send_signal(signal.SIGINT)
    assert f"runs: {opened} (Ctrl-C ends it)" in os.read(ours, 1000).decode()
    assert process.returncode == 0
    os.close(ours)
    os.close(terminal)


@pytest.mark.parametrize(
    ("environment", "has"),
    [({}, False), ({"TERM": "xterm"}, False), ({"DISPLAY": ":0"}, True), ({"DISPLAY": ""}, False)],
)
def test_terminals_are_no_browsers(environment: dict[str, str], has: bool) -> None:
    assert has_display(environment) == (has or sys.platform == "darwin")


def test_folder_may_come_later(tmp_path: Path) -> None:
    with subprocess.Popen(COMMAND, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("runs: http://127.0.0.1:")
        process.send_signal(signal.SIGTERM)
    assert process.returncode == -signal.SIGTERM


def test_server_starts_without_torch(tmp_path: Path) -> None:
    with serving(tmp_path) as address:
        assert address.startswith("http://127.0.0.1:")
    code = "import sys, distill_cli.ui.server; sys.exit(bool({'torch', 'vllm', 'mlflow'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
