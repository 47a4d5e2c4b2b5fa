"""Short runs in a temporary folder: `distill check` and `distill plan --measure`.

The models, mesh, engines and data are those of the run that was typed; only its length, and for a check its batch, are
changed. A folder with logs stays if something went wrong.
"""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from distill_cli.config.compose import Job, compose
from distill_cli.config.derived import validates
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.jobs.new_runs import make_bare_run, print_warnings, require_here, resolve_jobs
from distill_cli.launch.local import start_ranks
from distill_cli.metrics import SAMPLE_S, STAGES
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console

SEQUENCES = 8
"""Answers that a check looks at; one for each share of the ranks if there are more shares."""
TIMEOUT_S = 600.0
"""How long a collective of a check may take."""
STEPS = 4
"""Steps that are measured:

| step | what it takes |
|---|---|
| 1 | warms up, left out |
| 2, 3 | a step alone |
| 4 | a step, the checkpoint that is written after step 3, and the validation |
"""


def check_only_job(jobs: Sequence[Job], command: str) -> None:
    """Raise ConfigError if there are several jobs, or if the only one does not run on this machine."""
    if len(jobs) > 1:
        raise ConfigError(f"{command}: takes one configuration; leave -m out")
    for job in jobs:
        require_here(job.config, command)


@contextmanager
def scratch_run(resolved: ResolvedRun, *, root: Path, prefix: str) -> Iterator[RunDir]:
    """Make a run's folder in `root`, and remove it afterwards with all that was made for it; failures keep its logs.

    Raises:
        ConfigError: the folder cannot be made.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
    except OSError as error:
        what = f"{root}: no run folder can be made here ({error.strerror}); choose another run.root"
        raise ConfigError(what) from error
    kept = ""
    try:
        yield make_bare_run(folder, resolved)
    except DistillError:
        kept = "logs"
        raise
    finally:
        for path in [path for path in folder.iterdir() if path.name != kept]:
            remove = shutil.rmtree if path.is_dir() else Path.unlink
            remove(path)
        with suppress(OSError):  # the logs stay, or another run has begun there
            for path in (folder, *made):
                path.rmdir()


def self_check(overrides: Sequence[str], flags: Sequence[str]) -> int:
    """Start the ranks with `ranks.self_check`, which prints its findings; return 0.

    Engines run without CUDA graphs, whose capture would take longer than everything else.

    Raises:
        DistillError: the ranks failed, or a finding is not good.
    """
    console, begin = Console(highlight=False, soft_wrap=True), time.monotonic()
    jobs = compose(overrides, flags)
    check_only_job(jobs, "distill check")
    _, resolved = resolve_jobs(jobs, is_new=False)
    print_warnings(resolved, console=console, printed=set())
    for one in map(small, resolved):  # none if Hydra answered one of its flags
        with scratch_run(one, root=Path(tempfile.gettempdir()), prefix="distill-check-") as run:
            start_ranks(one, run, ["--check"])
            num_wrong = sum(finding["is_good"] is False for finding in read_json(run.outcome)["findings"])
            if num_wrong:
                raise DistillError(f"{num_wrong} wrong, {time.monotonic() - begin:.0f} s; logs: {run.logs}")
        console.print(f"everything is right, {time.monotonic() - begin:.0f} s")
    return 0


def small(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run with one small batch, without validation and trackers."""
    mesh = resolved.config.mesh
    shares = resolved.ranks.per_node // (mesh.tensor * mesh.context)
    num_sequences = math.ceil(SEQUENCES / shares) * shares
    typed = (
        f"rollout.prompts_per_step={num_sequences} rollout.generations_per_prompt=1 "
        f"train.global_batch_size={num_sequences} cluster.hang_timeout_s={TIMEOUT_S} "
        "eval.period=0 eval.at_start=false eval.at_end=false tracker=none "
        "checkpoint.enabled=true checkpoint.save_optimizer=true checkpoint.async_save=false "
        "engine.student.enforce_eager=true engine.teacher.enforce_eager=true"
    )
    return replace(resolved, config=override(resolved.config, typed.split()))


@dataclass(frozen=True)
class Pace:
    """Measured seconds."""

    start: float
    """From the command to the first step: imports, engines, the check of the first answers."""
    stages: dict[str, float]
    """Seconds of a step by stage; `other` is what belongs to no stage."""
    steps: tuple[float, ...]
    """The steps that a step's seconds are the median of."""
    validation: float | None
    """The student's, with its recorded answers; None if the run has none."""
    teacher_validation: float | None
    checkpoint: float | None
    """How long a checkpoint stops training; None if the run has none, or was too short to write one."""
    mean_length: float | None
    """Tokens of an answer; None if none ended (`rollout.carry_over`)."""
    sampling_ranks: float | None = None
    """Seconds in which the ranks that sample alone write a step's sequences; None if there are none."""
    rows: Sequence[Mapping[str, float]] = ()
    """The short run's metrics."""

    @property
    def step(self) -> float:
        return sum(self.stages.values())

    @property
    def binding(self) -> str:
        """The stage that sets the pace, and the keys that change it."""
        if (sampling := self.sampling_ranks) is None:
            stage = max(self.stages, key=self.stages.__getitem__)
            remedy = STAGES[stage].remedy if stage in STAGES else ""
            return f"{stage}, {self.stages[stage] / self.step:.0%} of a step" + (f": {remedy}" if remedy else "")
        training = self.step - self.stages.get("sample", 0.0) - self.stages.get("sync", 0.0)
        each = f"a step of the ranks that sample takes {sampling:.3f} s, of those that train {training:.3f} s"
        if sampling > training:
            return f"sampling ({each}): more ranks sample with engine.student.ranks; rollout.carry_over=true"
        return f"training ({each}): fewer ranks sample with engine.student.ranks"


def measure(resolved: ResolvedRun) -> Pace:
    """Run the first steps in a folder of their own, inside run.root, where checkpoints would go.

    Raises:
        DistillError: the ranks failed; of the folder, the logs stay.
        Stopped: the user stopped it.
    """
    resolved, began = short(resolved), time.time()
    with scratch_run(resolved, root=Path(resolved.config.run.root).absolute(), prefix=".measure-") as run:
        start_ranks(resolved, run)
        return pace(read_metrics(run.metrics), began=began)


def short(resolved: ResolvedRun) -> ResolvedRun:
    """Return the run, cut down to STEPS steps: one validation, one checkpoint, no tracker."""
    typed = (
        f"train.max_steps={min(STEPS, resolved.num_steps)} checkpoint.period={STEPS - 1} checkpoint.must_save_by=null "
        f"eval.period=0 eval.at_start=false eval.at_end={str(validates(resolved.config)).lower()} "
        "rollout.on_truncation=warn tracker=none"
    )
    return replace(resolved, config=override(resolved.config, typed.split()))


def pace(rows: Sequence[Mapping[str, float]], *, began: float) -> Pace:
    """Return what the rows of a short run measure; `rows[0]` may be of step 0, before training.

    Raises:
        DistillError: the run made no step.
    """
    steps = [row for row in rows if row["step"] > 0]
    if not steps:
        raise DistillError("distill plan --measure: the run ended before its first step")
    alone = [row for row in steps if not {"time/eval_s", "time/checkpoint_s"} & row.keys()]
    plain = alone[1:] or alone or steps  # the first warms up

    def typical(key: str) -> float:
        return median(row.get(key, 0.0) for row in plain)

    stages = {name: typical(f"time/{name}_s") for name, stage in STAGES.items() if stage.within_step}
    stages["other"] = max(0.0, typical("time/step_s") - sum(stages.values()))
    last, first = steps[-1], steps[0]
    lengths = [row["rollout/mean_length"] for row in steps if "rollout/mean_length" in row]
    validation = None
    if "val/accuracy" in last:
        usual = typical("time/record_s") if plain[-1] is not last else 0.0
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
        mean_length=fmean(lengths) if lengths else None,
        sampling_ranks=typical(SAMPLE_S) or None,
        rows=rows,
    )
