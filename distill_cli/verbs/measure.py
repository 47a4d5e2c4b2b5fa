"""`distill plan --measure`: seconds by stage, from a few real steps of the run itself on this machine.

The run is the one that was typed: its models, mesh, engines, batch and data. Only its length is changed, to STEPS steps
with one validation at their end; its folder is thrown away. What the steps' own `time/...` say is all that is used.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from distill_cli.config.compose import Job
from distill_cli.config.derived import validates
from distill_cli.config.schema import Config
from distill_cli.config.variation import override, save_config
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir
from distill_cli.jobs.prepare import require_here
from distill_cli.launch.local import start_ranks
from distill_cli.metrics import STAGES
from distill_cli.resolved import ResolvedRun

STEPS = 4
"""The first warms up. After the third a checkpoint is written, and after the fourth the student is validated: what the
two take beside a step is in the fourth one's row, and none of theirs is in the second's and third's."""
Row = Mapping[str, float]


@dataclass(frozen=True)
class Pace:
    """Seconds, measured."""

    start: float
    """From the command to the first step: imports, engines, the look at the first answers."""
    stages: dict[str, float]
    """Of a step, by stage; `other` is what is none of them."""
    steps: tuple[float, ...]
    """The steps that a step's seconds are the median of."""
    validation: float | None
    """The student's, with its recorded answers; None where the run has none."""
    teacher_validation: float | None
    checkpoint: float | None
    """For how long it stops training; None where the run has none, or was too short to see one."""
    mean_length: float
    """Tokens of an answer."""

    @property
    def step(self) -> float:
        return sum(self.stages.values())


def check_measurable(jobs: Sequence[Job]) -> None:
    """Raises ConfigError where there is nothing that could be measured here."""
    if len(jobs) > 1:
        raise ConfigError("distill plan --measure: takes one configuration; leave -m out")
    for job in jobs:
        require_here(job.config, "distill plan --measure")


def measure(job: Job, found: ResolvedRun) -> Pace:
    """Runs the job's first steps in a folder of their own, which is gone afterwards.

    Raises:
        DistillError: the ranks failed; their logs are what is left of the folder.
        Stopped: the user stopped it.
    """
    config, root = short(found), Path(job.config.run.root).absolute()
    made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)  # where checkpoints will go: they take as long as there
        folder = Path(tempfile.mkdtemp(prefix=".measure-", dir=root))
    except OSError as error:
        what = f"{root}: no run folder can be made here ({error.strerror}); choose another run.root"
        raise ConfigError(what) from error
    run, keeps_logs = RunDir(folder), False
    try:
        run.logs.mkdir(parents=True)
        save_config(config, run.config)
        found.write(run)
        began = time.time()
        start_ranks(replace(found, config=config), run)
        return pace(read_metrics(run.metrics), began=began)
    except DistillError:
        keeps_logs = True
        raise
    finally:
        if keeps_logs:
            for path in set(folder.iterdir()) - {folder / "logs"}:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            shutil.rmtree(folder)
            with suppress(OSError):  # another run has begun there
                for path in made:
                    path.rmdir()


def short(found: ResolvedRun) -> Config:
    """Return the run's config, cut down to STEPS steps: one validation, one checkpoint, no tracker."""
    return override(
        found.config,
        [
            f"train.max_steps={min(STEPS, found.num_steps)}",
            *("eval.period=0", "eval.at_start=false", f"eval.at_end={str(validates(found.config)).lower()}"),
            *(f"checkpoint.period={STEPS - 1}", "checkpoint.must_save_by=null"),
            *("rollout.on_truncation=warn", "tracker=none"),
        ],
    )


def pace(rows: Sequence[Row], *, began: float) -> Pace:
    """What the rows of a short run say: `rows[0]` is of before its first step.

    Raises:
        DistillError: the run made no step.
    """
    steps = [row for row in rows if row["step"] > 0]
    if not steps:
        raise DistillError("distill plan --measure: the run ended before its first step")
    alone = [row for row in steps if not {"time/eval_s", "time/checkpoint_s"} & row.keys()]
    plain = alone[1:] or alone or steps  # the first warms up
    stages = {name: _median(plain, f"time/{name}_s") for name, stage in STAGES.items() if stage.within_step}
    step = _median(plain, "time/step_s")
    stages["other"] = max(0.0, step - sum(stages.values()))
    last, first = steps[-1], steps[0]
    validation = None
    if "val/accuracy" in last:
        usual = _median(plain, "time/record_s") if plain[-1] is not last else 0.0
        validation = last["time/eval_s"] + max(0.0, last.get("time/record_s", 0.0) - usual)
    teacher_validation = rows[0].get("time/eval_s") if rows[0]["step"] == 0 else None
    start = first["time"] - began - first["time/step_s"] - (teacher_validation or 0.0)
    return Pace(
        start=max(0.0, start),
        stages={stage: seconds for stage, seconds in stages.items() if seconds > 0},
        steps=tuple(row["time/step_s"] for row in plain),
        validation=validation,
        teacher_validation=teacher_validation,
        checkpoint=last.get("time/checkpoint_s"),
        mean_length=fmean(row["rollout/mean_length"] for row in steps),
    )


def _median(rows: Sequence[Row], key: str) -> float:
    return median(row.get(key, 0.0) for row in rows)
