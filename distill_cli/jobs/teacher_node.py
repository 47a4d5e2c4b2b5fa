"""What each node of a teacher's job does: serve the teacher (`distill serve`) to one run, until that run is over.

The server listens on a free port with a certificate that is made here, and writes both into the run's folder. The
certificate's key stays in a private folder of the node. A warning before the time limit and a preemption stop the
server and queue the job again, as they do with a run's own job.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import job_config
from distill_cli.config.teachers import engine_key
from distill_cli.config.variation import load_config, override
from distill_cli.engines.server_files import Server, server_file, write_server
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.folders.run_dir import RunDir, SubmittedJob, read_json
from distill_cli.jobs.serving import ALONE, serve_config
from distill_cli.launch.base import Launcher, Place, launcher_of
from distill_cli.launch.local import stop_signals
from distill_cli.launch.nodes import node_variables
from distill_cli.resolved import ResolvedRun
from distill_cli.serving.certificate import make_certificate
from distill_cli.serving.server import Listen

LOOK_S = 30.0
"""Seconds between two looks for the run's job."""
UNSUBMITTED_S = 600.0
"""How long the run's job may take to be submitted after this one has begun."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


def serve_teacher(path: Path, name: str) -> int:
    """Serve a teacher of the run in a folder until a signal, or until the run is over; return the exit status."""
    run = RunDir(path)
    config = load_config(run.config)
    launcher = launcher_of(config.cluster.launcher)
    place = launcher.place()
    job = job_config(config, name)
    try:
        launcher.check_restarts(job, place)
        with stop_signals(), while_run_lasts(run, name, launcher, place):
            signum = serve_again(run, name, job, place)
    except Stopped as stopped:
        signum = stopped.signum
    except DistillError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", flush=True)
        return 1
    if place.node == 0:
        launcher.requeue(job, place, reason=signal.Signals(signum).name)
    return 0


def serve_again(run: RunDir, name: str, job: Config, place: Place) -> int:
    """Serve until a signal, again if an engine fails; return the signal's number.

    Raises:
        ConfigError: the teacher cannot be served.
        DistillError: engines failed more than cluster.max_restarts times.
    """
    os.environ |= node_variables(job.cluster)
    for number in range(job.cluster.max_restarts + 1):
        try:
            return serve_once(run, name, job, place)
        except DistillError as error:
            if isinstance(error, ConfigError) or number == job.cluster.max_restarts:
                raise
            print(f"warning: {error}; the server starts again", flush=True)
    raise AssertionError("the last attempt returns or raises")


def serve_once(run: RunDir, name: str, job: Config, place: Place) -> int:
    """Serve until a signal; return its number. Raises as `serve_again`, after the first failure."""
    file, host = server_file(run.servers(name), place.node), launcher_of(job.cluster.launcher).teacher_address()
    file.unlink(missing_ok=True)  # of a server that was killed
    resolved = ResolvedRun.read(run).by_teacher()[name]
    with tempfile.TemporaryDirectory(prefix="distill-teacher-") as private:
        certificate, key = make_certificate(Path(private), [host])
        listen = Listen("::" if ":" in host else "0.0.0.0", 0, certificate, key, public=host)
        here = partial(Server, certificate=certificate.read_text(), job_id=place.job_id)
        try:
            return serve_config(
                server_config(run, name, job, max_model_len=resolved.lengths.teacher),
                listen=listen,
                max_topk=job.loss.topk,
                on_listen=lambda address: write_server(file, here(address)),
                signals=SIGNALS,
            )
        finally:
            file.unlink(missing_ok=True)


def server_config(run: RunDir, name: str, job: Config, *, max_model_len: int) -> Config:
    """Return the config that a node's server reads: that of the teacher alone, on this machine.

    Unless the run's command gives another share of a GPU, the engine takes what `distill serve` takes.
    """
    key, _, share = ALONE[0].partition("=")
    changed = {
        "cluster.launcher": "local",
        "cluster.nodes": 1,
        "model.teacher.nodes": 0,
        "engine.teacher.max_model_len": max_model_len,
    }
    typed = {word.partition("=")[0].lstrip("+") for word in run.typed_overrides()}
    if not typed & {key, f"{engine_key(name)}.gpu_memory_utilization"}:
        changed |= {key: float(share)}
    return override(job, changed)


@contextmanager
def while_run_lasts(run: RunDir, name: str, launcher: Launcher, place: Place) -> Iterator[None]:
    """Send this process SIGTERM when the run's job ends in the block, or the teacher has got another job.

    Raises:
        DistillError: the run's job has ended before the block.
    """
    if has_ended(run, launcher, began=time.time()):
        raise DistillError("the job of the run has ended; there is nobody to serve")
    is_over = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(run, name, launcher, place, is_over), name="the run's job", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        is_over.set()


def _watch(run: RunDir, name: str, launcher: Launcher, place: Place, is_over: threading.Event) -> None:
    began = time.time()
    while not is_over.wait(LOOK_S):
        if has_ended(run, launcher, began=began) or is_replaced(run, name, place):
            print("the job of the run has ended, or has another server: this one stops", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
            return


def is_replaced(run: RunDir, name: str, place: Place) -> bool:
    """Return whether a later job serves the teacher."""
    try:
        job = SubmittedJob(**read_json(run.teacher_job(name)))
    except (OSError, ValueError):
        return False
    return job.job_id != place.job_id


def has_ended(run: RunDir, launcher: Launcher, *, began: float) -> bool:
    """Return whether the run's job has ended, or was not submitted in time; False if the cluster does not answer.

    Without the cluster's commands on this node only a job that has written its end counts.
    """
    try:
        job = SubmittedJob(**read_json(run.job))
    except (OSError, ValueError):
        return time.time() > began + UNSUBMITTED_S
    if run.end_of(job) is not None:
        return True
    with suppress(DistillError):
        return launcher.is_installed() and not launcher.status([job.job_id])
    return False
