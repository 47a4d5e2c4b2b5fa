"""Start new runs and resume existing ones, here or as jobs: single runs, replays, sweeps and searches.

The runs of a sweep are prepared at once and carried out here, some at a time, or as one job array. Every run has its
folder and its config before the first one starts: `distill resume SWEEP` carries out what did not finish, for whatever
reason. A run that fails does not stop the others.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.checkpoint.store import Checkpoint
from distill_cli.config.compose import Job, check_overrides, compose, refuse_sweep
from distill_cli.config.schema import Config, Schedule
from distill_cli.config.teacher_jobs import teacher_nodes
from distill_cli.config.teachers import model_key
from distill_cli.config.variation import forbidden_changes, load_config, override
from distill_cli.data.recorded_run import Recording
from distill_cli.data.row_check import KnownData
from distill_cli.errors import ConfigError, DistillError, Stopped, collect, refuse
from distill_cli.folders import run_dir
from distill_cli.folders.attempts import attempt_lines, attempts_of, finished_steps
from distill_cli.folders.run_dir import Element, RunDir, SubmittedJob, SweepDir
from distill_cli.jobs.new_runs import prepare, print_warnings, resolve_jobs, single_path, write_resolved
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.prepared_run import leave_report, run_to_completion
from distill_cli.jobs.run_panels import print_lines, relative, start_panel
from distill_cli.jobs.submit import in_queue, submit, wait_for_run, wait_for_sweep
from distill_cli.launch.base import NODE_PROGRAM, launcher_of
from distill_cli.launch.local import stop_signals
from distill_cli.machine import hardware
from distill_cli.machine.processes import die_with_parent
from distill_cli.report.comparison import print_comparison
from distill_cli.report.read import read_sweep
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.base import trackers_with


def new_console() -> Console:
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def replay_jobs(run: RunDir, overrides: Sequence[str], *, is_sweep: bool) -> list[Job]:
    """Return the jobs that train on a recorded run: one, or one for each element of a sweep.

    Raises:
        ConfigError: the run has no scores, an override is wrong, or nothing is swept; with all elements' problems.
    """
    if not is_sweep:
        check_overrides(overrides)
        refuse_sweep(overrides)
        return [replay_job(run, overrides)]
    elements = compose(overrides, ["--multirun"])
    if not any(element.swept for element in elements):
        raise ConfigError("-m: nothing is swept; give a key or a group several values, as in loss=forward,reverse")
    return collect(partial(replay_job, run, element.overrides, element.swept) for element in elements)


def replay_job(run: RunDir, overrides: Sequence[str], swept: Sequence[str] = ()) -> Job:
    """Return the job that trains on a recorded run: its config for all its steps without engines, then overrides.

    Args:
        swept: the overrides that distinguish it from the other replays of a sweep. If train.seed is one of them, it
            draws the order of the recorded steps: else all seeds would train the same student.

    Raises:
        ConfigError: the run has no scores, or an override is wrong.
    """
    config = override(
        load_config(run.config),
        {
            "rollout.replay": str(run.path),
            "rollout.save_scores": False,
            "rollout.replay_shuffle": any(word.lstrip("+").startswith("train.seed=") for word in swept),
            "train.max_steps": Recording.of(str(run.path)).num_steps,
            **{f"eval.{key}": False for key in ("at_start", "at_end", "teacher")},
            **{"eval.period": 0, "eval.record_samples": 0, "run.name": None},
            **{f"tracker.{name}.run_name": None for name in trackers_with("run_name")},
        },
    )
    config = override(config, overrides, typed=run.typed_overrides())
    losses = [word.partition("=")[2] for word in overrides if word.startswith("loss=")]
    choices = {"model": "replay", "loss": (losses or [config.loss.kl_type.replace(":", "_")])[-1]}
    return Job(config=config, choices=choices, overrides=list(overrides), swept=list(swept))


def run_jobs(jobs: Sequence[Job], *, command: Sequence[str]) -> int:
    """Check every job, then carry them out, alone or as a sweep, here or on a cluster; return the exit status.

    A failed run does not stop the others of its sweep.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    console, is_sweep = new_console(), any(job.swept for job in jobs)
    jobs, resolved = resolve_jobs(jobs)
    if is_sweep:
        check_sweep(jobs)
        sweep = new_sweep(jobs[0].config)
        runs, folder = add_runs(sweep, jobs, resolved, command=command, space={}), sweep.path
    else:
        runs = [prepare(resolved[0], single_path(jobs[0]), command=command)]
        folder = runs[0].path
    print_warnings(resolved, console=console, printed=set())
    with newest(folder, runs[-1], config=jobs[0].config):
        if is_sweep:
            return carry_out_sweep(runs, console=console)
        with runs[0].lock():
            submitted = start(resolved[0], runs[0], console=console)
        return wait_for_run(runs[0], submitted, console=console) if submitted else 0


def start(resolved: ResolvedRun, run: RunDir, *, console: Console) -> SubmittedJob | None:
    """Show a run, whose folder is locked, and carry it out to its end, or submit it; return the job to wait for."""
    console.print(start_panel(resolved, run))
    if launcher_of(resolved.config.cluster.launcher).runs_here:
        run_to_completion(resolved, run, console=console)
        return None
    job = submit(resolved.config, [run], folder=run.path, console=console)[0]
    return job if resolved.config.cluster.wait else None


@contextmanager
def newest(folder: Path, run: RunDir, *, config: Config) -> Iterator[None]:
    """Let `latest` point to the folder of a new run or sweep.

    If the cluster refuses the job of `run`, nothing was started: the folder is removed and the link points back.
    """
    latest = folder.with_name("latest")
    before = os.readlink(latest) if latest.is_symlink() else None
    run_dir.point_latest(folder.parent, folder.name)
    try:
        yield
    except ConfigError:
        if not launcher_of(config.cluster.launcher).runs_here and not run.job.exists():
            shutil.rmtree(folder)
            latest.unlink()
            if before is not None:
                run_dir.point_latest(folder.parent, before)
        raise


def new_sweep(config: Config) -> SweepDir:
    """Return where a sweep's folder will be; make nothing."""
    root = Path(config.run.root)
    name = config.run.name or run_dir.free_name(root, time.strftime("%Y%m%d-%H%M%S_sweep"))
    return SweepDir((root / name).absolute())


def add_runs(
    sweep: SweepDir, jobs: Sequence[Job], found: Sequence[ResolvedRun], *, command: Sequence[str], space: dict[str, str]
) -> list[RunDir]:
    """Make the folder of each run. sweep.json comes last: if it names a run, its folder is whole.

    Args:
        space: of a search, the ranges that its trials are drawn from; else empty.
    """
    known, env = sweep.elements(), run_dir.environment()
    numbered = enumerate(jobs, len(known))
    new = [Element(index, run_dir.element_name(index, job.swept), job.swept) for index, job in numbered]
    runs = [
        prepare(one, sweep.path / element.folder, command=command, env=env)
        for element, one in zip(new, found, strict=True)
    ]
    sweep.write(command=command, elements=[*known, *new], space=space)
    return runs


def check_sweep(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if the jobs cannot be one array."""
    cluster = jobs[0].config.cluster
    launcher = launcher_of(cluster.launcher)
    refuse(problem for job in jobs for problem in shared_teacher_problems(job.config))
    if not launcher.runs_here and any(job.config.cluster != cluster for job in jobs):
        raise ConfigError("cluster: all runs of an array get the same nodes; do not sweep cluster keys")
    refuse(launcher.problems(jobs[0].config, num_jobs=len(jobs)))


def shared_teacher_problems(config: Config) -> Iterator[str]:
    """Yield one line for each teacher of a sweep's run that would get a job of its own."""
    for name, nodes in teacher_nodes(config).items():
        fix = "start one with `distill serve` and give its address (url), or set nodes=0"
        yield f"{model_key(name)}.nodes={nodes}: the runs of a sweep cannot share a teacher's job; {fix}"


def carry_out_sweep(runs: Sequence[RunDir], *, console: Console) -> int:
    """Carry out these runs of a sweep, or only submit them without cluster.wait; return the exit status."""
    config, sweep = load_config(runs[0].config), SweepDir(runs[0].path.parent)
    if not launcher_of(config.cluster.launcher).runs_here and not config.cluster.wait:
        submit(config, runs, folder=sweep.path, console=console)
        return 0
    return conclude(sweep, carry_out_runs(runs, console=console), console=console)


def carry_out_runs(runs: Sequence[RunDir], *, console: Console) -> int:
    """Carry out these runs of a sweep, which share launcher and ranks, to their end; return how many failed."""
    resolved = ResolvedRun.read(runs[0], needs_teacher=False)
    if not launcher_of(resolved.config.cluster.launcher).runs_here:
        jobs = submit(resolved.config, runs, folder=runs[0].path.parent, console=console)
        return wait_for_sweep(runs, jobs, console=console)
    if (num_slots := resolved.config.cluster.parallel_jobs or 1) > 1:
        return run_side_by_side(runs, resolved, num_slots=num_slots, console=console)
    return run_in_turn(runs, console=console)


def conclude(sweep: SweepDir, failed: int, *, console: Console) -> int:
    """Print a sweep's results as a table and write them as a page; return the exit status."""
    print_comparison(console, read_sweep(sweep))
    leave_report([sweep.path], sweep.report, console=console)
    folder = relative(sweep.path)
    lines = {"report": relative(sweep.report), "folder": folder, "again": f"distill report {folder}"}
    print_lines(console, lines | ({"go on": f"distill resume {folder}"} if failed else {}))
    return 1 if failed else 0


def run_in_turn(runs: Sequence[RunDir], *, console: Console) -> int:
    """Carry out one run after the other, in this process; return how many failed."""
    failed = 0
    for number, run in enumerate(runs, start=1):
        console.rule(escape(f"{number}/{len(runs)} {run.path.name}"), align="left")
        try:
            with run.lock():
                resolved = ResolvedRun.read(run)
                run_to_completion(resolved, run.unused_attempt(), console=console, sweep=run.path.parent)
        except DistillError as error:
            console.print(f"error: {escape(str(error))}")
            failed += 1
    return failed


def run_side_by_side(runs: Sequence[RunDir], resolved: ResolvedRun, *, num_slots: int, console: Console) -> int:
    """Carry out `num_slots` runs of a sweep at a time, in processes that write output.txt; return how many failed."""
    waiting, failed = list(runs), 0
    running: dict[int, tuple[RunDir, subprocess.Popen[bytes]]] = {}
    with stop_signals():
        try:
            while waiting or running:
                for slot in [slot for slot in range(num_slots) if slot not in running][: len(waiting)]:
                    run = waiting.pop(0)
                    running[slot] = run, start_process(run.path, resolved, slot=slot, num_slots=num_slots)
                    console.print(f"starts   {escape(run.path.name)}")
                time.sleep(0.2)
                for slot, (run, process) in list(running.items()):
                    if (status := process.poll()) is not None:
                        del running[slot]
                        failed += status != 0
                        result = "finished" if status == 0 else f"status {status}: see its output.txt"
                        done = len(runs) - len(waiting) - len(running)
                        console.print(f"{done}/{len(runs)}  {escape(run.path.name)}: {result}")
        except Stopped:  # lets the runs save and end
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
            console.print(f"stopped: distill resume {escape(relative(runs[0].path.parent))} goes on")
            raise
    return failed


def start_process(folder: Path, resolved: ResolvedRun, *, slot: int, num_slots: int) -> subprocess.Popen[bytes]:
    """Start a prepared run in a process of its own, with its share of this machine's cores and GPUs."""
    per_node = resolved.ranks.per_node
    env = {**os.environ, "OMP_NUM_THREADS": str(hardware.threads_of_rank(num_slots * per_node))}
    if resolved.ranks.on_gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else list(map(str, range(hardware.visible_gpus())))
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * per_node : (slot + 1) * per_node])
    command = [sys.executable, "-m", NODE_PROGRAM, str(folder)]
    with (folder / "output.txt").open("ab") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=die_with_parent
        )


def resume_run(run: RunDir, step: str | None, overrides: Sequence[str], *, console: Console) -> int:
    """Resume one run, here or as a job; return the exit status."""
    with run.lock():
        check_not_queued([run])
        resolved, begin = resolve_resumed(run, overrides, step=step, console=console)
        if step is None and (done := finished_steps(run)) >= resolved.num_steps:
            fix = "give train.max_steps=N to go on, or --step N to go on from an earlier checkpoint"
            raise ConfigError(f"{run.path}: finished after {done} steps; {fix}")
        for warning in (*resolved.warnings, *schedule_warnings(run, resolved)):
            console.warn(warning)
        write_resolved(run, resolved)
        if step is not None and begin is not None:
            set_aside(run, later_than=begin.step)
        attempt = run.next_attempt()
        for line in attempt_lines(attempts_of(run)):
            console.print(escape(line))
        submitted = start(resolved, attempt, console=console)
    return wait_for_run(run, submitted, console=console) if submitted else 0


def resume_sweep(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> int:
    """Resume what did not finish of a sweep, here or as a job array; return the exit status. Queued runs stay queued.

    Raises:
        ConfigError: nothing is left to do, or some run cannot go on; nothing was started.
    """
    runs = reopen(sweep, overrides, console=console)
    if not runs:
        fix = "give train.max_steps=N to extend finished runs"
        raise ConfigError(f"{sweep.path}: every run has finished or is in the queue; {fix}")
    return carry_out_sweep(runs, console=console)


def resume_search(
    sweep: SweepDir, typed: Sequence[str], flags: Sequence[str], overrides: Sequence[str], *, console: Console
) -> int:
    """Resume the trials that did not finish, then draw the remaining ones; return the exit status.

    Args:
        typed: the overrides that the search was started with; `flags` are Hydra's.
        overrides: `search.*` are for the trials that remain, the others for all.

    Raises:
        ConfigError: all trials have finished, some are in the queue, or some trial cannot go on; nothing was started.
    """
    from distill_cli.jobs.search import carry_out_search, read_search  # imports Optuna

    newest = {word.partition("=")[0]: word for word in [*typed, *overrides]}
    search, runs = read_search(list(newest.values()), flags, command=sweep.command()), sweep.runs()
    with RunDir(sweep.path).lock():
        check_not_queued(runs)
        others = [word for word in overrides if not word.startswith("search.")]
        unfinished = reopen(sweep, others, console=console)
        if not unfinished and len(runs) >= search.num_trials:
            raise ConfigError(f"{sweep.path}: all {len(runs)} trials have finished; give search.trials=N for more")
        return carry_out_search(search, sweep, unfinished, console=console)


def reopen(sweep: SweepDir, overrides: Sequence[str], *, console: Console) -> list[RunDir]:
    """Write the overrides into the config of each run that goes on; return these, without those in the queue.

    Raises:
        ConfigError: some run cannot go on; nothing was written.
    """
    runs = sweep.runs()
    candidates = [run for run in runs if overrides or finished_steps(run) < 0]
    queued = in_queue(candidates)
    for path, job in queued.items():
        console.print(f"left     {escape(path.name)}: in the queue as {job}")
    known: KnownData = {}
    resolve = partial(resolve_resumed, overrides=overrides, known=known, console=console)
    left = [run for run in candidates if run.path not in queued]
    found = zip(left, collect(partial(resolve, run) for run in left), strict=True)
    going_on = [(run, resolved) for run, (resolved, _) in found if finished_steps(run) < resolved.num_steps]
    refuse(problem for _, resolved in going_on for problem in shared_teacher_problems(resolved.config))
    for run, resolved in going_on:
        write_resolved(run, resolved)
    if going_on:
        console.print(f"{len(going_on)} of {len(runs)} runs go on")
    return [run for run, _ in going_on]


def check_not_queued(runs: Sequence[RunDir]) -> None:
    """Raise ConfigError if the job of one of these runs has not ended."""
    queued = in_queue(runs).items()
    refuse(f"{path}: in the queue as {job}; wait for it to end, or cancel it" for path, job in queued)


def resolve_resumed(
    run: RunDir, overrides: Sequence[str], *, console: Console, step: str | None = None, known: KnownData | None = None
) -> tuple[ResolvedRun, Checkpoint | None]:
    """Check a run with overrides on top; return it, and the checkpoint to go on from (None: the beginning).

    Raises:
        ConfigError: the config is wrong or does not fit the checkpoint, or `step` has none.
    """
    config = override(load_config(run.config), overrides, typed=run.typed_overrides())
    if step is None:
        start = store.newest_whole(run.checkpoints, warn=console.warn)
    else:
        start = store.choose(run.checkpoints, step, config.checkpoint, warn=console.warn)
    made_with = load_config(start.path / store.CONFIG if start else run.config)
    rule = "which has shaped its weights; leave it, or start a new run"
    changes = forbidden_changes(made_with, config, unless="resume")
    refuse(f"{key}={new}: the run was made with {old}, {rule}" for key, old, new in changes)
    resolved = preflight(config, known)
    if start is not None:
        store.check_base(start, resolved.student)
    return resolved, start


def schedule_warnings(run: RunDir, resolved: ResolvedRun) -> Iterator[str]:
    """Warn if the learning rate's schedule ends at another step than before; call this before `write_resolved`."""
    schedule, after = resolved.config.train.schedule, resolved.num_steps
    with suppress(ConfigError):  # resolved.json is damaged, or its models have moved
        before = ResolvedRun.read(run, needs_teacher=False).num_steps
        if schedule is not Schedule.constant and after != before:
            yield f"train.schedule={schedule.value} now ends at step {after} instead of {before}: learning rates differ"


def set_aside(run: RunDir, *, later_than: int) -> None:
    """Move later checkpoints into checkpoints_aside/, where no attempt looks for them."""
    for checkpoint in store.find(run.checkpoints):
        if checkpoint.step > later_than:
            target = run.path / "checkpoints_aside" / checkpoint.path.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            checkpoint.path.rename(target)
