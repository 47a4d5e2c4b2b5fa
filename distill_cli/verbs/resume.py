"""Resume a run, or what did not finish of a sweep, from its newest checkpoint.

In the same folder, on any number of ranks and any mesh. Keys that have shaped the weights cannot be changed: they are
compared with the checkpoint's own config, and a difference is refused. The README lists the keys that can.

examples
  distill resume runs/latest
  distill resume runs/latest train.max_steps=2000      for longer
  distill resume runs/latest mesh.tensor=2             on another mesh
  distill resume runs/latest --step 40
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.credentials import credentials_environment
from distill_cli.config.schema import Config, Schedule
from distill_cli.config.variation import forbidden_changes, load_config, override, save_config
from distill_cli.data.row_check import DataFacts
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders.attempts import attempt_lines, attempts_of, read_outcome
from distill_cli.folders.run_dir import Element, RunDir, SweepDir
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.run_attempts import run_to_completion
from distill_cli.jobs.run_panels import start_panel
from distill_cli.jobs.submit import in_queue, submit, wait_for_run
from distill_cli.jobs.sweep import carry_out_sweep
from distill_cli.launch.base import launcher_of
from distill_cli.models.model_files import ModelFiles, fingerprint
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import Parser, parser_of


def declare(parser: Parser) -> None:
    parser.takes_subject("RUN|SWEEP", help="its folder, such as runs/latest")
    parser.add_argument("--step", type=_step, metavar="N", help="from an earlier checkpoint; later ones are set aside")
    parser.takes_wait()


def _step(word: str) -> int:
    if not word.isdecimal():
        raise ConfigError(f"--step {word}: must be the number of a step")
    return int(word)


def main(arguments: argparse.Namespace) -> int:
    """Resume a run, or a sweep's unfinished runs; return the exit status.

    Raises:
        ConfigError: there is no such run, it is in use, it is finished, or an override cannot be taken.
        DistillError: the run failed again.
    """
    path, step, overrides = Path(arguments.subject), arguments.step, arguments.overrides
    console = Console(highlight=False, soft_wrap=True)
    sweep = SweepDir(path.resolve())
    if sweep.file.is_file():
        if step is not None:
            raise ConfigError(f"--step {step}: goes back in one run; give a run's folder of {path}")
        take_up = resume_search if sweep.space() else resume_sweep
        return take_up(sweep, overrides, console=console)
    return resume_run(open_run(path), step, overrides, console=console)


def resume_run(run: RunDir, step: int | None, overrides: Sequence[str], *, console: Console) -> int:
    """One run, here or as a job; the exit status."""
    submitted = []
    with run.lock():
        for queued in in_queue([run]).values():
            raise ConfigError(f"{run.path}: in the queue as {queued}; wait for it to end, or cancel it")
        old = load_config(run.config)
        config = override(old, overrides, typed=job_of(run).overrides)
        launcher = launcher_of(config.cluster.launcher)
        start = start_of(run, step, config=config, console=console)
        found = preflight(config)
        if start is not None:
            check_base(start, found.student)
        if step is None and is_done(run, config, found):
            raise ConfigError(
                f"{run.path}: finished after {read_outcome(run).num_steps} steps; give train.max_steps=N to go on, "
                "or --step N to go on from an earlier checkpoint"
            )
        before = steps_before(run) or found.num_steps
        save_config(found.config, run.config)
        found.write(run)
        os.environ |= credentials_environment(config)
        if step is not None and start is not None:
            set_aside(run, later_than=start.step)
        attempt = run.next_attempt()
        warnings = list(found.warnings)
        if config.train.schedule is not Schedule.constant and found.num_steps != before:
            warnings.append(
                f"train.schedule={config.train.schedule.value} now ends at step {found.num_steps} instead of "
                f"{before}: the learning rate of the steps to come is another"
            )
        for warning in warnings:
            console.print(f"warning: {escape(warning)}")
        for line in attempt_lines(attempts_of(run)):
            console.print(escape(line))
        console.print(start_panel(found, attempt))
        if launcher.runs_here:
            run_to_completion(found, attempt, console=console)
        else:
            submitted = submit(found.config, [run], folder=run.path, console=console)
    if submitted and config.cluster.wait:
        return wait_for_run(run, submitted[0], console=console)
    return 0


def resume_sweep(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> int:
    """What did not finish of a sweep, here or as a job array; the exit status. What is in the queue stays there.

    Raises:
        ConfigError: nothing is left to do, or some run cannot go on; nothing was started.
    """
    elements = reopen(sweep, overrides, console=console)
    if not elements:
        raise ConfigError(
            f"{sweep.path}: every run has finished or is in the queue; give train.max_steps=N to go on with the former"
        )
    return carry_out_sweep(sweep, elements, console=console)


def resume_search(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> int:
    """Resume the trials that did not finish, then draw the remaining ones; return the exit status.

    `search.*` overrides are for the trials that remain, the others for all.

    Raises:
        ConfigError: all trials have finished, some are in the queue, or some trial cannot go on; nothing was started.
    """
    from distill_cli.jobs.search import carry_out_search, read_search  # Optuna takes a while to import

    command = sweep.command()
    typed = parser_of("train").parse([word for word in command[1:] if word != "train"])
    words = {word.partition("=")[0]: word for word in [*typed.overrides, *overrides]}
    asked, elements = read_search(list(words.values()), typed.flags, command=command), sweep.elements()
    with RunDir(sweep.path).lock():
        for job in in_queue([RunDir(sweep.path / element.folder) for element in elements]).values():
            raise ConfigError(f"{sweep.path}: a trial is in the queue as {job}; wait for it to end, or cancel it")
        others = [word for word in overrides if not word.startswith("search.")]
        unfinished = reopen(sweep, others, console=console)
        if not unfinished and len(elements) >= asked.config.search.trials:
            raise ConfigError(f"{sweep.path}: all {len(elements)} trials have finished; give search.trials=N for more")
        return carry_out_search(asked, sweep, unfinished, console=console)


def reopen(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> list[Element]:
    """Write the overrides into the config of each run that goes on; return these, without those that Slurm has.

    Raises:
        ConfigError: some run cannot go on; nothing was written.
    """
    elements = sweep.elements()
    runs = {element.index: RunDir(sweep.path / element.folder) for element in elements}
    open_elements = [element for element in elements if overrides or not has_finished(runs[element.index])]
    queued = in_queue([runs[element.index] for element in open_elements])
    for path, job in queued.items():
        console.print(f"left     {escape(path.name)}: in the queue as {job}")
    resolved: dict[int, ResolvedRun] = {}
    problems: dict[str, None] = {}
    known_data: dict[str, DataFacts] = {}
    for element in open_elements:
        run = runs[element.index]
        if run.path in queued:
            continue
        try:
            config = override(load_config(open_run(run.path).config), overrides, typed=job_of(run).overrides)
            start = start_of(run, None, config=config, console=console)
            found = preflight(config, known_data)
            if start is not None:
                check_base(start, found.student)
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
            continue
        if not is_done(run, config, found):
            resolved[element.index] = found
    if problems:
        raise ConfigError(*problems)
    for index, found in resolved.items():
        save_config(found.config, runs[index].config)
        found.write(runs[index])
        os.environ |= credentials_environment(found.config)
    if resolved:
        console.print(f"{len(resolved)} of {len(elements)} runs go on")
    return [element for element in elements if element.index in resolved]


def steps_before(run: RunDir) -> int | None:
    """Return how many steps the run was to have; None if that cannot be read any more."""
    try:
        return ResolvedRun.read(run, needs_teacher=False).num_steps
    except ConfigError:
        return None


def has_finished(run: RunDir) -> bool:
    outcome = read_outcome(run)
    return outcome is not None and outcome.is_finished


def is_done(run: RunDir, config: Config, found: ResolvedRun) -> bool:
    """Whether the run has finished all the steps that the config asks for."""
    return has_finished(run) and read_outcome(run).num_steps >= found.num_steps


def open_run(path: Path) -> RunDir:
    """The run in a folder. Raises ConfigError where none is."""
    run = RunDir(path.resolve())
    if not run.config.is_file():
        what = "no such folder" if not path.exists() else "no run is there (it has no config.yaml)"
        raise ConfigError(f"{path}: {what}; give a run's folder, such as runs/latest")
    return run


def start_of(run: RunDir, step: int | None, *, config: Config, console: Console) -> Checkpoint | None:
    """The checkpoint to go on from; None is the beginning.

    Raises:
        ConfigError: `step` has none, or the config does not fit it.
    """

    def warn(text: str) -> None:
        console.print(f"warning: {escape(text)}")

    if step is None:
        start = store.newest_whole(run.checkpoints, warn=warn)
    else:
        try:
            start = store.choose(run.checkpoints, str(step), metric="", higher_is_better=True, warn=warn)
        except DistillError as error:
            raise ConfigError(str(error)) from error
    made_under = start.path / store.CONFIG if start else run.config
    problems = differences(load_config(made_under), config)
    if problems:
        raise ConfigError(*problems)
    return start


def check_base(checkpoint: Checkpoint, student: ModelFiles) -> None:
    """Raise ConfigError if the frozen weights that a checkpoint's adapters belong to are no longer the same."""
    expected = checkpoint.state.get("base")
    if expected is not None and fingerprint(student.folder) != expected:
        raise ConfigError(
            f"model.student.path={student.path}: its weights are not those that the adapters of {checkpoint.path} were "
            f"trained on; put them back in {student.folder}"
        )


def differences(old: Config, new: Config) -> list[str]:
    """Return one line for each key that differs and may not."""
    return [
        f"{key}={after}: the run was made with {before}, which has shaped its weights; leave it, or start a new run"
        for key, before, after in forbidden_changes(old, new, unless="resume")
    ]


def set_aside(run: RunDir, *, later_than: int) -> None:
    """Moves checkpoints that the run goes back behind to where no attempt looks for them."""
    for checkpoint in store.find(run.checkpoints):
        if checkpoint.step > later_than:
            aside = run.path / "checkpoints_aside"
            aside.mkdir(exist_ok=True)
            shutil.rmtree(aside / checkpoint.path.name, ignore_errors=True)
            checkpoint.path.rename(aside / checkpoint.path.name)
