"""The folder of a run before its ranks start: its place, what is in it, and the job read back from it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from distill_cli import memory
from distill_cli.config.compose import Job, config_text, load_config
from distill_cli.config.schema import Config
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import Preflight
from distill_cli.machine import hardware


def single_path(job: Job) -> Path:
    """Return where the folder of a run that is part of no sweep will be."""
    root = Path(job.config.run.root)
    return root / (job.config.run.name or run_dir.free_name(root, run_dir.default_name(job.choices)))


def prepare(
    job: Job, checked: Preflight, path: Path, *, command: Sequence[str], env: dict[str, Any] | None = None
) -> RunDir:
    """Make a run's folder, with the config that its ranks will read. See `run_dir.create` for `env`."""
    run = run_dir.create(path.absolute(), command=command, config=config_text(job.config), env=env)
    write_memory(job.config, checked, run)
    return run


def write_memory(config: Config, checked: Preflight, run: RunDir) -> None:
    """Write a rank's predicted memory by part, for the report; no file if there is no prediction."""
    is_gpu = bool(hardware.gpus_per_node(config))
    ranks = hardware.ranks_per_node(config) * config.cluster.nodes
    gpu_bytes = (hardware.gpu_memory() or 0) if is_gpu else None
    with suppress(memory.NoPrediction):
        shape = memory.read_shape(checked.student, config.model.student.lora)
        folders = (checked.student, checked.teacher)
        predicted = memory.predict(config, shape, *folders, num_ranks=ranks, gpu_bytes=gpu_bytes)
        parts = {**predicted.trainer.parts, **predicted.engines}
        run_dir.write_json(run.memory, {"peak": predicted.peak, "asleep": predicted.asleep, "parts": parts})


def job_of(run: RunDir) -> Job:
    """Return the job that a run's folder was made for: its config, and the overrides that were typed."""
    words = shlex.split(run.command.read_text())[1:] if run.command.exists() else []
    return Job(config=load_config(run.config), choices={}, overrides=[word for word in words if "=" in word], swept=[])
