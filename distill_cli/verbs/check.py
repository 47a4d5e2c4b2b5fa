"""Check loss, engines, sync and checkpoint on the real models, in two minutes.

Is the loss zero where teacher and student are the same model, and not zero otherwise? Do sampler, scorer and trainer
agree on log-probabilities? Is the loss the mean over all tokens, and the gradient its slope? Do a step, a sync and a
checkpoint do what they should? Each answer is a number against a limit, with a fix if it is not met (status 1).

examples
  distill check
  distill check model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill check cluster.ranks_per_node=2 mesh.context=2
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import compose, save_config
from distill_cli.config.flags import add_hydra_flags
from distill_cli.config.schema import Config, Launcher
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.run import exit_status
from distill_cli.launch.local import launch
from distill_cli.launch.placement import placement
from distill_cli.machine import hardware
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser

SEQUENCES = 8
"""Answers that are looked at, or one for each share of the ranks where those are more."""
TIMEOUT_S = 600.0


def declare(parser: Parser) -> None:
    parser.takes_overrides()
    add_hydra_flags(parser)


def main(arguments: argparse.Namespace) -> int:
    """Start the ranks on a few short answers (`ranks.self_check`); return 0 if every finding is good, else 1.

    Engines run without CUDA graphs, which take longer to capture than everything else here. Nothing is left behind
    unless something is wrong.

    Raises:
        ConfigError: the config is wrong, or describes several jobs or one for Slurm.
        DistillError: the ranks failed.
    """
    jobs = compose(arguments.overrides, arguments.flags)
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
    config.tracker.mlflow.enabled = False
    config.checkpoint.enabled, config.checkpoint.save_optimizer, config.checkpoint.async_save = True, True, False
    config.engine.student.enforce_eager = config.engine.teacher.enforce_eager = True
    return config
