"""Runs whose teacher is on a scoring server: equal losses, a server that goes away, and what is refused."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from distill_cli.folders.metrics_file import read_metrics
from tests.end_to_end.conftest import SHORT, Finished, distill, refused
from tests.serving.running import TOKEN, Running, start

OFF = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0", "tracker=none")
STEPS = 12
ARGV = (*SHORT[1:], *OFF, f"train.max_steps={STEPS}", "checkpoint.period=4", "cluster.ranks_per_node=2")
WITH_TOKEN = {"DISTILL_SERVER_TOKEN": TOKEN}
SEEN_S = 120
"""How long a step may take to be recorded."""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = start("--fixed-batches", "--max-topk=32")
    running.wait_ready()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="module")
def served(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    url = f"model.teacher.url={server.address}"
    return distill(tmp_path_factory.mktemp("served"), *ARGV, url, **WITH_TOKEN)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["in_process", "companion"])
def test_losses_are_those_of_the_job(served: Finished, tmp_path: Path, place: str) -> None:
    assert served.status == 0, served.stdout + served.stderr
    where = [f"rollout.score_while_sampling={'true' if place == 'companion' else 'false'}"]
    done = distill(tmp_path, *ARGV, *where)
    assert done.status == 0, done.stdout + done.stderr
    for ours, theirs in zip(served.metrics[1:], done.metrics[1:], strict=True):
        for name in ("train/loss", "train/kl_forward", "train/kl_reverse", "train/teacher_topk_mass"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), (ours["step"], name)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_run_without_a_server_is_resumable(server: Running, served: Finished, tmp_path: Path) -> None:
    first = start("--fixed-batches", "--max-topk=32")
    first.wait_ready()
    url = f"model.teacher.url={first.address}"
    command = [sys.executable, "-m", "distill_cli", *ARGV, url, "model.teacher.patience_s=2", "run.name=lost"]
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for_step(tmp_path / "runs/lost", 5)
    for process in [*first.engines, first.process]:
        process.kill()
    _, error = run.communicate(timeout=SEEN_S)
    assert run.returncode == 1
    assert "no scoring server of distill answered" in error
    assert "distill resume runs/lost goes on" in error
    last = read_metrics(tmp_path / "runs/lost/metrics.jsonl")[-1]["step"]
    assert (tmp_path / f"runs/lost/checkpoints/step_{last}").is_dir()
    resumed = distill(tmp_path, "resume", "runs/lost", f"model.teacher.url={server.address}", **WITH_TOKEN)
    assert resumed.status == 0, resumed.stdout + resumed.stderr
    file = "student/model.safetensors"
    assert (tmp_path / "runs/lost" / file).read_bytes() == (served.run.path / file).read_bytes()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_resume_refuses_another_model(server: Running, served: Finished, tmp_path: Path) -> None:
    other = start("model.teacher.path=package://tiny_pair/student", "model=tiny", "--max-topk=32")
    other.wait_ready()
    argv = (f"model.teacher.url={other.address}", f"train.max_steps={STEPS + 1}", "cluster.max_restarts=0")
    done = distill(served.folder, "resume", "runs/latest", *argv, **WITH_TOKEN)
    other.stop()
    assert done.status in (1, 2), done.stdout
    assert "its weights are not those that the run began with" in done.stderr


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_stop_during_the_handshake_ends_the_run(server: Running, tmp_path: Path) -> None:
    """The teacher never answers its questions, and nothing is there to save."""
    held = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=forward, args=(listener, server.port, held), daemon=True).start()
        url = f"model.teacher.url=http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "distill_cli", *ARGV, url, "cluster.grace_s=600"]
        run = subprocess.Popen(command, cwd=tmp_path, env=environment())
        try:
            assert held.wait(SEEN_S)
            run.send_signal(signal.SIGTERM)
            assert run.wait(SEEN_S) == 128 + signal.SIGTERM
        finally:
            run.kill()


def forward(listener: socket.socket, port: int, held: threading.Event) -> None:
    """Pass connections on to a server, but no request for answers to prompts: `held` is set then."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        while data := source.recv(65536):
            if data.startswith(b"POST /sample"):
                held.set()
                return
            target.sendall(data)

    while True:
        client, _ = listener.accept()
        behind = socket.create_connection(("127.0.0.1", port))
        for ends in ((client, behind), (behind, client)):
            threading.Thread(target=copy, args=ends, daemon=True).start()


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.slow
def test_unsuitable_servers_are_refused(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=page.serve_forever, daemon=True).start()
    elsewhere = f"http://127.0.0.1:{page.server_port}"
    monkeypatch.setenv("DISTILL_SERVER_TOKEN", TOKEN)
    cases = {
        (f"model.teacher.url={elsewhere}",): "not a scoring server of distill",
        (f"model.teacher.url={server.address}", "loss.topk=64"): "start it with --max-topk 64",
        (f"model.teacher.url={server.address}", "data.max_teacher_prompt_tokens=600"): "engine.teacher.max_model_len=",
        ("model.teacher.url=http://example.org:8008",): "would travel in the clear",
        ("model.teacher.url=example.org",): "must begin with http:// or https://",
        (f"model.teacher.url=[{server.address}, {server.address}]",): "must be an address",
        (f"model.teacher.url={server.address}", "model.teacher.patience_s=1800"): "model.teacher.patience_s=1800",
        ("model.teacher.ema=0.9",): "only model.teacher.path=student has weights that move",
    }
    for argv, expected in cases.items():
        typed = (*OFF, "loss.topk=16", "data.teacher_context=solution", *argv)
        assert expected in "\n".join(refused(tmp_path, monkeypatch, capsys, *typed)), argv
    monkeypatch.setenv("DISTILL_SERVER_TOKEN", "wrong")
    (line,) = refused(tmp_path, monkeypatch, capsys, f"model.teacher.url={server.address}")
    assert "set DISTILL_SERVER_TOKEN to the token of the server" in line
    page.shutdown()


def environment() -> dict[str, str]:
    return {**os.environ, **WITH_TOKEN}


def wait_for_step(run: Path, step: int) -> None:
    end = time.monotonic() + SEEN_S
    while time.monotonic() < end:
        rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        if any(row["step"] >= step for row in rows):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not recorded in {SEEN_S} s")
