"""`distill replay RUN [OVERRIDES]`: trains again on what a run recorded, with another loss or another student.

The run's config is the base; what it recorded takes the place of prompts, answers and the teacher. It becomes a run of
its own, with a folder of its own. Nothing is validated, and so no engine is started, unless that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from distill_cli.config.compose import Job, load_config
from distill_cli.config.schema import Config
from distill_cli.data.recorded_run import Recording
from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import RunDir
from distill_cli.track.base import tracker_names
from distill_cli.verbs.resume import open_run, with_overrides
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
    config = with_overrides(base_config(run), overrides)
    losses = [word.partition("=")[2] for word in overrides if word.startswith("loss=")]
    choices = {"model": "replay", "loss": (losses or [config.loss.kl_type.replace(":", "_")])[-1]}
    job = Job(config=config, choices=choices, overrides=overrides, swept=[])
    return run_jobs([job], command=["distill", "replay", *argv])


def base_config(run: RunDir) -> Config:
    """The recorded run's own config as a replay of all its steps that asks no engine anything."""
    config = load_config(run.config)
    config.rollout.replay, config.rollout.save_scores = str(run.path), False
    config.train.max_steps = Recording.of(str(run.path)).num_steps
    config.eval.period, config.eval.record_samples = 0, 0
    config.eval.at_start = config.eval.at_end = config.eval.teacher = False
    config.run.name = None
    for name in tracker_names():
        getattr(config.tracker, name).run_name = None
    return config
