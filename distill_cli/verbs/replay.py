"""Train again on what a run recorded (rollout.save_scores), without engines.

The run's config is the base. Its recorded sequences, with the teacher's top-k, take the place of prompts, answers and
the teacher, step by step: only a student is trained, as a run of its own, on any number of ranks. Loss, optimizer,
student and mesh may differ from the recorded run's; what shaped the recording may not, and loss.topk may not grow.
Nothing is validated unless eval.period, eval.at_start or eval.at_end ask for it: that starts the student's engine.

examples
  distill replay runs/latest loss=reverse
  distill replay runs/latest loss.topk=16 train.lr=5e-4
  distill replay runs/latest eval.at_end=true
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distill_cli.config.compose import Job
from distill_cli.config.variation import load_config, override
from distill_cli.data.recorded_run import Recording
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.prepare import job_of
from distill_cli.track.base import tracker_names
from distill_cli.verbs.command_line import Parser
from distill_cli.verbs.resume import open_run
from distill_cli.verbs.train import run_jobs


def declare(parser: Parser) -> None:
    parser.takes_subject("RUN", help="folder of a run that kept its scores, such as runs/latest")
    parser.takes_wait()


def main(arguments: argparse.Namespace) -> int:
    """Train on a recorded run; return the exit status.

    Raises:
        ConfigError: no such run, or one without scores; an override that does not fit what was recorded.
        DistillError: the replay failed.
    """
    run, overrides = open_run(Path(arguments.subject)), arguments.overrides
    config = override(load_config(run.config), base_overrides(run))
    config = override(config, overrides, typed=job_of(run).overrides)
    losses = [word.partition("=")[2] for word in overrides if word.startswith("loss=")]
    choices = {"model": "replay", "loss": (losses or [config.loss.kl_type.replace(":", "_")])[-1]}
    job = Job(config=config, choices=choices, overrides=overrides, swept=[])
    return run_jobs([job], command=arguments.command)


def base_overrides(run: RunDir) -> dict[str, Any]:
    """Return what makes a run's config a replay of all its steps that starts no engine."""
    return {
        "rollout.replay": str(run.path),
        "rollout.save_scores": False,
        "train.max_steps": Recording.of(str(run.path)).num_steps,
        "eval.period": 0,
        "eval.record_samples": 0,
        "eval.at_start": False,
        "eval.at_end": False,
        "eval.teacher": False,
        "run.name": None,
        **{f"tracker.{name}.run_name": None for name in tracker_names()},
    }
