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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import Job
from distill_cli.config.schema import Config, Launcher
from distill_cli.errors import ConfigError, DistillError
from distill_cli.folders import run_dir
from distill_cli.folders.run_dir import Element, RunDir, SweepDir
from distill_cli.jobs import submit
from distill_cli.jobs.run import carry_out, job_of, leave_report, prepare
from distill_cli.launch import slurm
from distill_cli.launch.local import Stopped, stop_signals
from distill_cli.machine import hardware
from distill_cli.machine.processes import die_with_parent
from distill_cli.report.comparison import print_comparison
from distill_cli.report.read import read_sweep
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console


def prepare_sweep(jobs: Sequence[Job], checked: Sequence[ResolvedRun], *, command: Sequence[str]) -> SweepDir:
    """The sweep's folder, with every run's in it.

    Raises:
        ConfigError: the jobs cannot be one sweep.
    """
    check_sweep(jobs)
    sweep = new_sweep(jobs[0].config)
    add_runs(sweep, jobs, checked, command=command)
    return sweep


def new_sweep(config: Config) -> SweepDir:
    """Where a sweep's folder is to be; nothing is made."""
    root = Path(config.run.root)
    name = config.run.name or run_dir.free_name(root, time.strftime("%Y%m%d-%H%M%S_sweep"))
    return SweepDir((root / name).absolute())


def add_runs(
    sweep: SweepDir,
    jobs: Sequence[Job],
    checked: Sequence[ResolvedRun],
    *,
    command: Sequence[str],
    space: dict[str, str] | None = None,
) -> list[Element]:
    """Makes the folder of each run. sweep.json comes last: where it names a run, its folder is whole.

    Args:
        space: what a sweep that chooses its runs one after the other searches.
    """
    there = sweep.elements() if sweep.file.is_file() else []
    new = [
        Element(index, run_dir.element_name(index, job.swept), job.swept) for index, job in enumerate(jobs, len(there))
    ]
    env = run_dir.environment()
    for element, found in zip(new, checked, strict=True):
        prepare(found, sweep.path / element.folder, command=command, env=env)
    sweep.write(command=command, elements=[*there, *new], space=space)
    run_dir.point_latest(sweep.path.parent, sweep.path.name)
    return new


def discard(sweep: SweepDir) -> None:
    """Takes a sweep's folder away that nothing was started of."""
    shutil.rmtree(sweep.path)
    latest = sweep.path.parent / "latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink()


def check_sweep(jobs: Sequence[Job]) -> None:
    """Raises ConfigError where the jobs cannot be one array, or cannot share this machine."""
    cluster = jobs[0].config.cluster
    if cluster.launcher is not Launcher.slurm:
        return
    if any(job.config.cluster != cluster for job in jobs):
        raise ConfigError("cluster: the runs of an array get nodes alike; do not sweep its keys")
    if len(jobs) > slurm.max_array_size():
        raise ConfigError(
            f"a sweep of {len(jobs)} runs: an array of this cluster holds {slurm.max_array_size()}; make several sweeps"
        )


def carry_out_sweep(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """These runs of a sweep, to their end or into the queue; the exit status.

    Args:
        config: of any of them: what it says of the cluster holds for all.
    """
    if config.cluster.launcher is Launcher.slurm and not config.cluster.wait:
        submit_sweep(sweep, elements, config, console=console)
        return 0
    return conclude(sweep, carry_out_runs(sweep, elements, config, console=console), console=console)


def carry_out_runs(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """These runs of a sweep, to their end; how many failed."""
    if config.cluster.launcher is Launcher.slurm:
        job_ids = submit_sweep(sweep, elements, config, console=console)
        return wait_for_sweep(sweep, elements, job_ids, console=console)
    if config.cluster.parallel_jobs > 1:
        return run_side_by_side(sweep, elements, config, console=console)
    return run_in_turn(sweep, elements, console=console)


def conclude(sweep: SweepDir, failed: int, *, console: Console) -> int:
    """What came of a sweep, as a table and a page; the exit status."""
    print_comparison(console, read_sweep(sweep))
    leave_report([sweep.path], sweep.report, console=console)
    console.print(f"report   {escape(str(sweep.report))}")
    console.print(f"folder   {escape(str(sweep.path))}")
    console.print(f"again    distill report {escape(str(sweep.path))}")
    if failed:
        console.print(f"go on    distill resume {escape(str(sweep.path))}")
    return 1 if failed else 0


def run_in_turn(sweep: SweepDir, elements: Sequence[Element], *, console: Console) -> int:
    """One after the other, in this process; how many failed."""
    failed = 0
    for number, element in enumerate(elements, start=1):
        run = RunDir(sweep.path / element.folder)
        console.rule(escape(f"{number}/{len(elements)} {' '.join(element.overrides)}"), align="left")
        try:
            with run.lock():
                carry_out(job_of(run), run.unused_attempt(), console=console)
        except DistillError as error:
            console.print(f"error: {escape(str(error))}")
            failed += 1
    return failed


def run_side_by_side(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> int:
    """cluster.parallel_jobs at a time, each in a process of its own that writes output.txt; how many failed."""
    waiting, failed = list(elements), 0
    free = list(range(config.cluster.parallel_jobs))
    running: dict[int, tuple[Element, subprocess.Popen]] = {}
    with stop_signals(), ending(running):
        while waiting or running:
            while waiting and free:
                element, slot = waiting.pop(0), free.pop(0)
                running[slot] = (element, start_element(sweep.path / element.folder, config, slot=slot))
                console.print(f"starts   {escape(element.folder)}")
            time.sleep(0.2)
            for slot, (element, process) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                free.append(slot)
                failed += process.returncode != 0
                told = "finished" if process.returncode == 0 else f"status {process.returncode}: output.txt says why"
                done = len(elements) - len(waiting) - len(running)
                console.print(f"{done}/{len(elements)}  {escape(element.folder)}: {told}")
    return failed


@contextmanager
def ending(running: dict[int, tuple[Element, subprocess.Popen]]) -> Iterator[None]:
    """Lets the processes save and end where the sweep is stopped."""
    try:
        yield
    except Stopped:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
        raise


def start_element(folder: Path, config: Config, *, slot: int) -> subprocess.Popen:
    """A prepared run in a process of its own, with its part of this machine's cores and GPUs."""
    gpus, jobs = hardware.gpus_per_node(config), config.cluster.parallel_jobs
    threads = len(os.sched_getaffinity(0)) // (jobs * hardware.ranks_per_node(config))
    env = {"OMP_NUM_THREADS": str(max(threads, 1)), **os.environ}
    if gpus:
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = listed.split(",") if listed else [str(number) for number in range(hardware.visible_gpus())]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names[slot * gpus : (slot + 1) * gpus])
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "distill_cli.jobs.element", str(folder)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )


def submit_sweep(sweep: SweepDir, elements: Sequence[Element], config: Config, *, console: Console) -> list[str]:
    """One job array; the id of each run's job. What to type next is printed.

    Raises:
        ConfigError: Slurm refuses it.
    """
    runs = [RunDir(sweep.path / element.folder) for element in elements]
    job_ids = submit.submit_array(config, sweep.path, runs)
    array, folder = job_ids[0].partition("_")[0], escape(submit.quoted(sweep.path))
    console.print(f"job      {array}, an array of {len(runs)}" if len(runs) > 1 else f"job      {array}")
    console.print(f"folder   {folder}")
    console.print(f"follow   squeue -r -j {array}; distill report {folder}")
    console.print(f"cancel   scancel {array}")
    console.print(f"resume   distill resume {folder}")
    return job_ids


def wait_for_sweep(sweep: SweepDir, elements: Sequence[Element], job_ids: Sequence[str], *, console: Console) -> int:
    """Says which runs have ended, until all have; how many failed. Each run's folder is looked into once."""
    open_jobs, failed = dict(zip(job_ids, elements, strict=True)), 0
    for active in submit.watch(job_ids):
        for job_id in [job_id for job_id in open_jobs if job_id not in active]:
            element = open_jobs.pop(job_id)
            status, told = submit.how_it_ended(RunDir(sweep.path / element.folder), job_id)
            failed += status != 0
            console.print(f"{len(elements) - len(open_jobs)}/{len(elements)}  {escape(element.folder)}: {escape(told)}")
    return failed
