"""`distill replay RUN [OVERRIDES]`: trains again on what a run recorded, with another loss or another student.

The run's config is the base; what it recorded takes the place of prompts, answers and the teacher. It becomes a run of
its own, with a folder of its own. Nothing is validated, and so no engine is started, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_cli.config.compose import Job
from distill_cli.config.variation import load_config, override
from distill_cli.data.recorded_run import Recording
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir
from distill_cli.verbs.resume import open_run, varied
from distill_cli.verbs.train import run_jobs


def replay(argv: Sequence[str]) -> int:
    """The verb; its exit status.

    Raises:
        ConfigError: no such run, or one without scores; an override that does not fit what was recorded.
        DistillError: the replay failed.
    """
    words = list(argv)
    if not words or words[0].startswith("-") or "=" in words[0]:
        raise ConfigError("distill replay: which run? give the folder of one that kept its scores, such as runs/latest")
    others = [word for word in words[1:] if word.startswith("-") or "=" not in word]
    if others:
        raise ConfigError(f"{' '.join(others)}: `distill replay` takes a run and overrides")
    run, overrides = open_run(Path(words[0])), words[1:]
    config = varied(override(load_config(run.config), base_overrides(run)), overrides)
    losses = [word.partition("=")[2] for word in overrides if word.startswith("loss=")]
    choices = {"model": "replay", "loss": (losses or [config.loss.kl_type.replace(":", "_")])[-1]}
    job = Job(config=config, choices=choices, overrides=overrides, swept=[])
    return run_jobs([job], command=["distill", "replay", *argv])


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
        "tracker.mlflow.run_name": None,
    }
