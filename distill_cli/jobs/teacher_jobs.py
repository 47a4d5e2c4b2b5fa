"""The jobs that serve the teachers of a run: submit them, replace one that has ended too early, end them with the run.

`python -m distill_cli.jobs.teacher_jobs RUN NAME` submits one anew, from a job of the run. The servers' token is in the
environment alone: that of the submitting command, which Slurm hands to the jobs, and these to what they submit.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import teacher_nodes
from distill_cli.config.variation import load_config
from distill_cli.engines.server_files import remove_servers
from distill_cli.engines.wire import TOKEN
from distill_cli.errors import DistillError
from distill_cli.folders.run_dir import RunDir, SubmittedJob, write_json
from distill_cli.launch.base import Place, launcher_of
from distill_cli.terminal.console import Console

LOOK_S = 30.0
"""Seconds between two looks of a run for the jobs of its teachers."""
OWN_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SUBMITIT_", "PMI_", "PMIX_")
"""Variables of a job, which another job must not inherit."""
OF_THE_CLUSTER = ("SLURM_CONF",)
OWN_DEVICES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def submit_teachers(config: Config, run: RunDir) -> dict[str, SubmittedJob]:
    """Submit the job of each teacher that has one; return them by teacher. Those of an earlier job are ended.

    The token goes into this process's environment, for the jobs that it submits: the shell's, or a random one.

    Raises:
        ConfigError: the cluster refuses a job; none is left.
    """
    names = list(teacher_nodes(config))
    end_teachers(run)  # one of an earlier job has another token
    if names and not os.environ.get(TOKEN):
        os.environ[TOKEN] = secrets.token_hex(32)
    try:
        return {name: submit_teacher(config, run, name) for name in names}
    except DistillError:
        end_teachers(run)
        raise


def submit_teacher(config: Config, run: RunDir, name: str) -> SubmittedJob:
    """Submit the job of one teacher. Raises ConfigError if the cluster refuses it."""
    folder = run.servers(name)
    folder.mkdir(parents=True, exist_ok=True)
    remove_servers(folder)
    job = launcher_of(config.cluster.launcher).submit_teacher(config, name, run)
    write_json(run.teacher_job(name), asdict(job))
    return job


def end_teachers(run: RunDir) -> None:
    """Cancel the jobs of a run's teachers, and forget them; does nothing if there is none."""
    for name, job in run.teacher_jobs().items():
        launcher = launcher_of(job.launcher)
        with suppress(DistillError):  # its servers notice that the run is over
            if launcher.is_installed() and launcher.status([job.job_id]):
                launcher.cancel([job.job_id])
        remove_servers(run.servers(name))
        run.teacher_job(name).unlink(missing_ok=True)


@contextmanager
def kept(run: RunDir, config: Config, place: Place, *, console: Console) -> Iterator[None]:
    """Submit the job of a teacher again within the block if it ends, as often as cluster.max_restarts has it.

    A job that is queued again by the cluster has not ended. Does nothing outside a job.
    """
    if place.job_id is None or not teacher_nodes(config):
        yield
        return
    is_over = threading.Event()
    arguments = (run, config, is_over, console)
    thread = threading.Thread(target=_keep, args=arguments, name="teachers' jobs", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _keep(run: RunDir, config: Config, is_over: threading.Event, console: Console) -> None:
    launcher, counts, most = launcher_of(config.cluster.launcher), Counter[str](), config.cluster.max_restarts
    while launcher.is_installed():
        for name, job in run.teacher_jobs().items():
            try:
                if counts[name] > most or launcher.status([job.job_id]):
                    continue
                counts[name] += 1
                state = launcher.end_state(job.job_id) or "unknown"
                next_step = "another one is submitted" if counts[name] <= most else f"cluster.max_restarts={most}"
                console.warn(f"job {job.job_id} of {name} has ended ({state}), log: {job.log}; {next_step}")
                if counts[name] <= most:
                    submit_again(run, name)
            except DistillError as error:  # the next look tries again
                console.warn(str(error))
        if is_over.wait(LOOK_S):
            return


def submit_again(run: RunDir, name: str) -> None:
    """Submit the job of a teacher from a job of the run, in a process without that job's variables.

    Raises:
        DistillError: it fails.
    """
    command = [sys.executable, "-m", __name__, str(run.path), name]
    env = environment_of_others(os.environ)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DistillError(f"the job of {name} cannot be submitted: {done.stderr.strip()[-500:]}")


def environment_of_others(env: Mapping[str, str]) -> dict[str, str]:
    """Return the environment with which a job submits another one."""
    return {
        name: value
        for name, value in env.items()
        if name in OF_THE_CLUSTER or not (name.startswith(OWN_JOB) or name in OWN_DEVICES)
    }


if __name__ == "__main__":
    its_run = RunDir(Path(sys.argv[1]))
    submit_teacher(load_config(its_run.config), its_run, sys.argv[2])
