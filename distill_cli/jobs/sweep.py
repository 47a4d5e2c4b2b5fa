"""The runs of a sweep, prepared at once and carried out here, some at a time, or as one job array.

Every run has its folder and its config before the first one starts: what did not finish, for whatever reason, is what
`distill resume SWEEP` takes up. One that fails does not stop the others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import Job
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import Element, RunDir, SubmittedJob, SweepDir
from distill_cli.jobs.prepare import job_of, prepare
from distill_cli.jobs.run_attempts import leave_report, run_to_completion
from distill_cli.jobs.submit import POLL_S, job_outcome, submit
from distill_cli.launch.base import NODE_PROGRAM, launcher_of
from distill_cli.launch.local import stop_signals
from distill_cli.machine import hardware
from distill_cli.machine.processes import die_with_parent
from distill_cli.report.comparison import print_comparison
from distill_cli.report.read import read_sweep
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console


def new_sweep(config: Config) -> SweepDir:
    """Return where a sweep's folder will be; make nothing."""
    root = Path(config.run.root)
    name = config.run.name or run_dir.free_name(root, time.strftime("%Y%m%d-%H%M%S_sweep"))
    return SweepDir((root / name).absolute())


def add_runs(
    sweep: SweepDir,
    jobs: Sequence[Job],
    resolved: Sequence[ResolvedRun],
    *,
    command: Sequence[str],
    space: dict[str, str] | None = None,
) -> list[Element]:
    """Make the folder of each run. sweep.json comes last: if it names a run, its folder is whole.

    Args:
        space: what a sweep that chooses its runs one after the other searches.
    """
    there = sweep.elements() if sweep.file.is_file() else []
    new = [
        Element(index, run_dir.element_name(index, job.swept), job.swept) for index, job in enumerate(jobs, len(there))
    ]
    env = run_dir.environment()
    for element, found in zip(new, resolved, strict=True):
        prepare(found, sweep.path / element.folder, command=command, env=env)
    sweep.write(command=command, elements=[*there, *new], space=space)
    run_dir.point_latest(sweep.path.parent, sweep.path.name)
    return new


def discard(sweep: SweepDir) -> None:
    """Remove the folder of a sweep of which nothing was started."""
    shutil.rmtree(sweep.path)
    latest = sweep.path.parent / "latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink()


def discard_if_refused(sweep: SweepDir, elements: Sequence[Element], config: Config) -> None:
    """`discard` a sweep whose jobs the cluster has refused."""
    if not launcher_of(config.cluster.launcher).runs_here and not runs_of(sweep, elements)[-1].job.exists():
        discard(sweep)


def check_sweep(jobs: Sequence[Job]) -> None:
    """Raise ConfigError if the jobs cannot be one array."""
    cluster = jobs[0].config.cluster
    launcher = launcher_of(cluster.launcher)
    if launcher.runs_here:
        return
    if any(job.config.cluster != cluster for job in jobs):
        raise ConfigError("cluster: the runs of an array get nodes alike; do not sweep its keys")
    if problems := list(launcher.problems(jobs[0].config, num_jobs=len(jobs))):
        raise ConfigError(*problems)


def carry_out_sweep(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """Bring these runs of a sweep to their end, or into the queue; return the exit status.

    Args:
        config: of any of them: what it says about the cluster holds for all.
    """
    if not launcher_of(config.cluster.launcher).runs_here and not config.cluster.wait:
        submit(config, runs_of(sweep, elements), folder=sweep.path, console=console)
        return 0
    return conclude(sweep, carry_out_runs(sweep, elements, config, console=console), console=console)


def carry_out_runs(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """Bring these runs of a sweep to their end; return how many failed."""
    if not launcher_of(config.cluster.launcher).runs_here:
        jobs = submit(config, runs_of(sweep, elements), folder=sweep.path, console=console)
        return wait_for_sweep(sweep, elements, jobs, console=console)
    if (config.cluster.parallel_jobs or 1) > 1:
        return run_side_by_side(sweep, elements, config, console=console)
    return run_in_turn(sweep, elements, console=console)


def runs_of(sweep: SweepDir, elements: Sequence[Element]) -> list[RunDir]:
    return [RunDir(sweep.path / element.folder) for element in elements]


def conclude(sweep: SweepDir, failed: int, *, console: Console) -> int:
    """Leave what came of a sweep, as a table and a page; return the exit status."""
    print_comparison(console, read_sweep(sweep))
    leave_report([sweep.path], sweep.report, console=console)
    console.print(f"report   {escape(str(sweep.report))}")
    console.print(f"folder   {escape(str(sweep.path))}")
    console.print(f"again    distill report {escape(str(sweep.path))}")
    if failed:
        console.print(f"go on    distill resume {escape(str(sweep.path))}")
    return 1 if failed else 0


def run_in_turn(sweep: SweepDir, elements: Sequence[Element], *, console: Console) -> int:
    """Carry out one after the other, in this process; return how many failed."""
    failed = 0
    for number, (element, run) in enumerate(zip(elements, runs_of(sweep, elements), strict=True), start=1):
        console.rule(escape(f"{number}/{len(elements)} {' '.join(element.overrides)}"), align="left")
        try:
            with run.lock():
                run_to_completion(job_of(run), run.unused_attempt(), console=console)
        except DistillError as error:
            console.print(f"error: {escape(str(error))}")
            failed += 1
    return failed


def run_side_by_side(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """Carry out cluster.parallel_jobs at a time, in processes that write output.txt; return how many failed."""
    waiting, failed = list(elements), 0
    running: dict[int, tuple[Element, subprocess.Popen]] = {}
    with stop_signals():
        try:
            while waiting or running:
                for slot in set(range(config.cluster.parallel_jobs)) - running.keys():
                    if waiting:
                        element = waiting.pop(0)
                        running[slot] = (element, start_process(sweep.path / element.folder, config, slot=slot))
                        console.print(f"starts   {escape(element.folder)}")
                time.sleep(0.2)
                for slot, (element, process) in list(running.items()):
                    if (status := process.poll()) is None:
                        continue
                    del running[slot]
                    failed += status != 0
                    how = "finished" if status == 0 else f"status {status}: output.txt says why"
                    done = len(elements) - len(waiting) - len(running)
                    console.print(f"{done}/{len(elements)}  {escape(element.folder)}: {how}")
        except Stopped:  # lets them save and end
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
            raise
    return failed


def start_process(folder: Path, config: Config, *, slot: int) -> subprocess.Popen:
    """Start a prepared run in a process of its own, with its part of this machine's cores and GPUs."""
    gpus, jobs = hardware.gpus_per_node(config), config.cluster.parallel_jobs
    threads = len(os.sched_getaffinity(0)) // (jobs * hardware.ranks_per_node(config))
    env = {"OMP_NUM_THREADS": str(max(threads, 1)), **os.environ}
    if gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else [str(number) for number in range(hardware.visible_gpus())]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * gpus : (slot + 1) * gpus])
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", NODE_PROGRAM, str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def wait_for_sweep(
    sweep: SweepDir, elements: Sequence[Element], jobs: Sequence[SubmittedJob], *, console: Console
) -> int:
    """Print which runs have ended, until all have; return how many failed. Each run's folder is read once."""
    launcher, wait_s = launcher_of(jobs[0].launcher), POLL_S[0]
    open_jobs, failed = dict(zip(jobs, elements, strict=True)), 0
    while True:
        active = launcher.status([job.job_id for job in open_jobs])
        for job in [job for job in open_jobs if job.job_id not in active]:
            element = open_jobs.pop(job)
            status, text = job_outcome(RunDir(sweep.path / element.folder), job)
            failed += status != 0
            console.print(f"{len(elements) - len(open_jobs)}/{len(elements)}  {escape(element.folder)}: {escape(text)}")
        if not open_jobs:
            return failed
        time.sleep(wait_s)
        wait_s = min(wait_s * 1.3, POLL_S[1])
