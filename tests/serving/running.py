"""A server in a process of its own, of the teacher that ships with distill."""

import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

TOKEN = "secret"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
TEACHER = "package://tiny_pair/teacher"
THREADS = {"OMP_NUM_THREADS": "1"}  # those of the tests' own engines: sums in another order have other last bits


@dataclass
class Running:
    """A started server."""

    process: subprocess.Popen[str]
    port: int
    scheme: str = "http"
    lines: list[str] = field(default_factory=list)
    """What it has printed so far, errors too."""

    @property
    def address(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def engines(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def get(self, route: str, **options: Any) -> httpx.Response:
        return httpx.get(self.address + route, **{"headers": HEADERS, "trust_env": False, "timeout": 30, **options})

    def post(self, route: str, content: Any, **options: Any) -> httpx.Response:
        options = {"headers": HEADERS, "trust_env": False, "timeout": 60, **options}
        return httpx.post(self.address + route, content=content, **options)

    def metric(self, name: str, **options: Any) -> float:
        lines = self.get("/metrics", **options).text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def wait_ready(self, **options: Any) -> list[httpx.Response]:
        """Return what /health answered until it was ready."""
        seen: list[httpx.Response] = []
        while not seen or seen[-1].status_code != 200:
            assert self.process.poll() is None, self.lines
            time.sleep(0.05)
            try:
                seen.append(self.get("/health", **options))
            except httpx.TransportError:
                continue
        return seen

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)


def start(*arguments: str, scheme: str = "http", **env: str) -> Running:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "distill_cli", "serve", f"--port={port}", *arguments],
        env={**os.environ, "DISTILL_SERVER_TOKEN": TOKEN, **THREADS, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    running = Running(process, port, scheme)
    assert process.stdout is not None
    threading.Thread(target=running.lines.extend, args=(process.stdout,), daemon=True).start()
    return running


def folder() -> Path:
    import distill_cli

    return Path(distill_cli.__file__).parent / "assets" / "tiny_pair" / "teacher"
