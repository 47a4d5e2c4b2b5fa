"""`distill check`: two minutes on the real models, mesh and engines, before hours are spent on them.

The ranks are started as for a run, on a few short answers (`selfcheck` asks the questions). Engines run without CUDA
graphs, which would take longer to make than all the rest. Nothing is left behind unless something is wrong.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import compose, save_config
from distill_cli.config.schema import Config, Launcher, TrackerConfig
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.run import exit_status
from distill_cli.launch.local import launch
from distill_cli.launch.placement import placement
from distill_cli.machine import hardware
from distill_cli.terminal.console import Console

SEQUENCES = 8
"""Answers that are looked at, or one for each share of the ranks where those are more."""
TIMEOUT_S = 600.0


def check(argv: Sequence[str]) -> int:
    """The verb; 0 where all is as it should be, 1 where something is not.

    Raises:
        ConfigError: the config is wrong, or describes several jobs or one for Slurm.
        DistillError: the ranks failed.
    """
    jobs = compose(argv)
    if not jobs:
        return 0
    if len(jobs) > 1:
        raise ConfigError("distill check: takes one configuration; leave -m out")
    console, begin = Console(highlight=False, soft_wrap=True), time.monotonic()
    config = small(jobs[0].config)
    if config.cluster.launcher is not Launcher.local:
        raise ConfigError("distill check: runs where it is typed; inside an allocation, type it with cluster=local")
    for warning in preflight(jobs[0].config).warnings:
        console.print(f"[yellow]warn[/yellow] {escape(warning)}")
    folder = Path(tempfile.mkdtemp(prefix="distill-check-"))
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    save_config(config, run.config)
    with exit_status() as status:
        try:
            launch(
                run,
                num_ranks=hardware.ranks_per_node(config),
                use_gpus=hardware.gpus_per_node(config) > 0,
                check=True,
                hang_timeout_s=TIMEOUT_S,
                env=placement(config.cluster),
            )
        finally:
            outcome = json.loads(run.outcome.read_text()) if run.outcome.exists() else {}
            if outcome.get("is_good"):
                shutil.rmtree(folder)
        bad = [finding["what"] for finding in outcome["findings"] if finding["is_good"] is False]
        seconds = f"{time.monotonic() - begin:.0f} s"
        console.print(f"{len(bad)} wrong, {seconds}; logs: {run.logs}" if bad else f"all is as it should be, {seconds}")
        status.value = 1 if bad else 0
    return status.value


def small(config: Config) -> Config:
    """The same models, mesh and engines on one small batch, without what a check does not look at."""
    config = copy.deepcopy(config)
    shares = hardware.ranks_per_node(config) // (config.mesh.tensor * config.mesh.context)
    num_sequences = math.ceil(SEQUENCES / shares) * shares
    config.rollout.prompts_per_step = num_sequences
    config.rollout.generations_per_prompt = 1
    config.train.global_batch_size = num_sequences
    config.eval.period, config.eval.at_start, config.eval.at_end = 0, False, False
    config.tracker = TrackerConfig()
    config.checkpoint.enabled, config.checkpoint.save_optimizer, config.checkpoint.async_save = True, True, False
    config.engine.student.enforce_eager = config.engine.teacher.enforce_eager = True
    return config
