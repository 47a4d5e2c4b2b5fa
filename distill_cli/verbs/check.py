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
import json
import math
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import compose
from distill_cli.config.flags import add_hydra_flags
from distill_cli.config.schema import Config
from distill_cli.config.variation import override, save_config
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.prepare import require_here
from distill_cli.launch.local import start_ranks
from distill_cli.resolved import ResolvedRun
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
        ConfigError: the config is wrong, or describes several jobs or one for a cluster.
        DistillError: the ranks failed.
    """
    jobs = compose(arguments.overrides, arguments.flags)
    if not jobs:
        return 0
    if len(jobs) > 1:
        raise ConfigError("distill check: takes one configuration; leave -m out")
    require_here(jobs[0].config, "distill check")
    console, begin = Console(highlight=False, soft_wrap=True), time.monotonic()
    found = preflight(jobs[0].config)
    for warning in found.warnings:
        console.print(f"[yellow]warn[/yellow] {escape(warning)}")
    config = small(found)
    folder = Path(tempfile.mkdtemp(prefix="distill-check-"))
    run = RunDir(folder)
    run.logs.mkdir(parents=True)
    save_config(config, run.config)
    found.write(run)
    try:
        start_ranks(replace(found, config=config), run, ["--check"])
    finally:
        outcome = json.loads(run.outcome.read_text()) if run.outcome.exists() else {}
        if outcome.get("is_good"):
            shutil.rmtree(folder)
    bad = [finding["what"] for finding in outcome["findings"] if finding["is_good"] is False]
    seconds = f"{time.monotonic() - begin:.0f} s"
    console.print(f"{len(bad)} wrong, {seconds}; logs: {run.logs}" if bad else f"everything is right, {seconds}")
    return 1 if bad else 0


def small(found: ResolvedRun) -> Config:
    """Return the config of the same models, mesh and engines on one small batch, without what is not checked."""
    config = found.config
    shares = found.ranks.per_node // (config.mesh.tensor * config.mesh.context)
    num_sequences = math.ceil(SEQUENCES / shares) * shares
    return override(
        config,
        [
            f"rollout.prompts_per_step={num_sequences}",
            "rollout.generations_per_prompt=1",
            f"train.global_batch_size={num_sequences}",
            *("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none"),
            *("checkpoint.enabled=true", "checkpoint.save_optimizer=true", "checkpoint.async_save=false"),
            *("engine.student.enforce_eager=true", "engine.teacher.enforce_eager=true"),
            f"cluster.hang_timeout_s={TIMEOUT_S}",
        ],
    )
