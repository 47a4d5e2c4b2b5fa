"""Runs as Slurm jobs: their scripts, submitting, requeueing.

submitit writes the script, gives it to sbatch and starts a task on each node, which is `run_node_program`. A warning
(SIGUSR2, before the time limit) or a preemption lets the ranks save and queues the job again: the run goes on in the
same folder, as its next attempt. Any other SIGTERM is scancel's: the run stays down.
"""

import importlib
import io
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, DistillError, broken
from distill_cli.folders.run_dir import RunDir, SubmittedJob
from distill_cli.launch.base import NODE_PROGRAM, Launcher
from distill_cli.launch.nodes import Place
from distill_cli.launch.slurm_cluster import SlurmCluster, last_line, parse_time_limit
from distill_cli.machine import hardware
from distill_cli.resolved import ResolvedRun

RESERVED_SBATCH = {
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "partition", "time", "array", "signal"),
    *("output", "error", "open-mode", "requeue", "no-requeue", "account", "qos", "constraint", "exclude", "mem"),
}
"""Parameters of sbatch that another key sets, or that following and requeueing a job rest on."""
REQUEUE_S = 300.0
"""More than Slurm takes to end a job that is queued again."""
VARIABLES = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_JOB_NODELIST")


def run_node_program(run: str) -> None:
    """Do the task of a node."""
    if status := importlib.import_module(NODE_PROGRAM).carry_out(Path(run)):
        sys.exit(status)


class Slurm(SlurmCluster, Launcher):
    name = "slurm"
    task: Callable[[str], None] = staticmethod(run_node_program)
    """What each node of a job does with the run's folder."""

    def resolve(self, config: Config) -> Config:
        try:
            partition = self.find_partition(config.cluster.slurm.partition)
        except ConfigError:  # which `problems` raises
            return config
        if config.cluster.gpus_per_node is None:
            config = override(config, {"cluster.gpus_per_node": 0 if hardware.has_cpu_vllm() else partition.gpus})
        if config.cluster.slurm.cpus_per_node is None:
            share = min((config.cluster.gpus_per_node or 0) / partition.gpus, 1) if partition.gpus else 0
            cpus = max(int(partition.cpus * share), hardware.ranks_per_node(config))
            config = override(config, {"cluster.slurm.cpus_per_node": cpus})
        return config

    def problems(self, config: Config, *, num_jobs: int = 1) -> Iterator[str]:
        yield from value_problems(config)
        cluster, settings = config.cluster, config.cluster.slurm
        partition = self.find_partition(settings.partition)
        gpus, nodes = cluster.gpus_per_node or 0, min(partition.num_nodes, partition.max_nodes)
        limit, minutes = parse_time_limit(settings.time or "") or 0, partition.max_time_s / 60
        where, fix = f"partition {partition.name}", "lower it, or choose another"
        yield from broken(
            (not partition.is_up, f"cluster.slurm.partition={partition.name}: is down; choose another, or wait"),
            (cluster.nodes > nodes, f"cluster.nodes={cluster.nodes}: {where} gives a job at most {nodes}; {fix}"),
            (limit > minutes * 60, f"cluster.slurm.time={settings.time}: {where} allows {minutes:g} minutes; {fix}"),
            (gpus > partition.gpus, f"cluster.gpus_per_node={gpus}: a node of {where} has {partition.gpus}; {fix}"),
        )
        if problem := self.unshared(Path(config.run.root), settings.shared_folders):
            yield problem
        if num_jobs > 1 and num_jobs > (size := self.max_array_size):
            yield f"a sweep of {num_jobs} runs: an array of this cluster holds {size}; make several sweeps"

    def script(self, resolved: ResolvedRun, *, folder: Path, num_jobs: int = 1) -> str:
        executor = make_executor(resolved.config, folder, max_jobs=num_jobs)
        if num_jobs > 1:
            executor.parameters["map_count"] = num_jobs
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def submit(self, config: Config, runs: Sequence[RunDir], *, folder: Path) -> list[SubmittedJob]:
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        executor, paths = make_executor(config, folder, max_jobs=len(runs)), [str(run.path) for run in runs]
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints what it raises
                jobs = executor.map_array(self.task, paths) if runs[1:] else [executor.submit(self.task, *paths)]
        except (FailedJobError, FailedSubmissionError) as error:
            reason = last_line(str(error)).removeprefix("sbatch: error: ")
            raise ConfigError(f"Slurm refuses the job: {reason.rpartition(' failed: ')[2]}") from error
        logs = folder / self.name  # the first node's output
        return [SubmittedJob(self.name, job.job_id, str(logs / f"{job.job_id}_0_log.out")) for job in jobs]

    def hints(self, job_ids: Sequence[str]) -> dict[str, str]:
        job = job_ids[0].partition("_")[0]
        several = f", an array of {len(job_ids)}" if len(job_ids) > 1 else ""
        return {"job": f"{job}{several}", "queue": f"squeue -r -j {job}", "cancel": f"scancel {job}"}

    def place(self) -> Place:
        import submitit

        here = submitit.JobEnvironment()
        address = self.address(here.hostnames[0]) if here.num_nodes > 1 else "localhost"
        restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return Place(here.job_id, restarts, here.node, here.num_nodes, address)

    def check_restarts(self, config: Config, place: Place) -> None:
        """Slurm counts starts after preemptions and lost nodes too, and has no limit of its own."""
        count, most = place.num_restarts, config.cluster.slurm.max_requeues
        if count > most:
            limit = f"cluster.slurm.max_requeues={most}"
            raise DistillError(f"started again {count} times, more than {limit}; distill resume goes on")

    def requeue(self, config: Config, place: Place, *, reason: str) -> None:
        is_preempted = reason == signal.SIGTERM.name and self.was_preempted(place.job_id)
        if reason != signal.SIGUSR2.name and not is_preempted:
            return
        if place.num_restarts >= (most := config.cluster.slurm.max_requeues):
            print(f"cluster.slurm.max_requeues={most}: the job is not queued again", flush=True)
            return
        print(f"job {place.job_id} is queued again", flush=True)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.ask("scontrol", "requeue", str(place.job_id))
        time.sleep(REQUEUE_S)  # Slurm ends this process

    def tags(self) -> dict[str, str]:
        names = [name for name in VARIABLES if os.environ.get(name)]
        return {"slurm." + name.removeprefix("SLURM_").lower(): os.environ[name] for name in names}

    def findings(self) -> list[tuple[str, bool, str, str]]:
        if not self.is_installed():  # nothing is wrong with a machine without Slurm
            return [("slurm", True, "no squeue here: runs stay on this machine", "")]
        try:
            partitions = self.partitions.values()
        except ConfigError as error:
            return [("slurm", False, str(error), "start slurmctld, or ask who runs the cluster")]
        fix = "choose another cluster.slurm.partition"
        return [(f"slurm {one.name}", one.is_up, str(one), fix) for one in partitions]


def value_problems(config: Config) -> Iterator[str]:
    """Yield what is wrong with cluster.slurm.* on any cluster."""
    settings, grace_s, at = config.cluster.slurm, config.cluster.grace_s, "cluster.slurm"
    typed, signal_s = f"{at}.time={settings.time}", settings.signal_s
    limit = math.inf if settings.time is None else parse_time_limit(settings.time)
    for name in sorted(RESERVED_SBATCH & {str(key).replace("_", "-") for key in settings.extra}):
        yield f"{at}.extra.{name}: is set by distill, which relies on it; leave it out"
    yield from broken(
        (limit is None, f"{typed}: must be minutes, HH:MM:SS or D-HH:MM:SS"),
        (limit and limit <= signal_s, f"{typed}: must exceed {at}.signal_s={signal_s} seconds; raise it"),
        (signal_s < grace_s, f"{at}.signal_s={signal_s}: saving may take cluster.grace_s={grace_s:g} s; raise it"),
        (any("\n" in line for line in settings.setup), f"{at}.setup: an element is one line; give several"),
    )


def parameters(config: Config, *, name: str, max_jobs: int) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor for a resolved config."""
    cluster, settings = config.cluster, config.cluster.slurm
    extra = {str(key).replace("_", "-"): value for key, value in settings.extra.items()}
    # One start is one attempt in the same folder: log files go on, and Slurm may start the job again.
    extra |= {"requeue" if settings.max_requeues else "no-requeue": True}
    has_own_gpus = {"gres", "gpus", "gpus-per-task", "gpus-per-node"} & extra.keys()
    cpus = f"--cpus-per-task={settings.cpus_per_node}"  # srun no longer takes it from sbatch
    container = [
        f"--container-{key}" + ("" if value is True else f"={value}") for key, value in settings.container.items()
    ]
    same = ("partition", "account", "qos", "time", "mem", "constraint", "exclude")
    return {key: getattr(settings, key) for key in same} | {
        "job_name": name,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_node,
        "gpus_per_node": None if has_own_gpus else cluster.gpus_per_node or None,
        "signal_delay_s": settings.signal_s,
        "setup": list(settings.setup) or None,
        "srun_args": ["--kill-on-bad-exit=1", cpus, *container],
        "additional_parameters": extra,
        "array_parallelism": cluster.parallel_jobs or max_jobs,
        "stderr_to_stdout": True,
        "wckey": None,
    }


def make_executor(config: Config, folder: Path, *, max_jobs: int) -> Any:
    """Return submitit's executor for jobs of this config; scripts, pickles and output go to `folder`/slurm."""
    import submitit

    executor = submitit.SlurmExecutor(folder=folder / Slurm.name, python=config.cluster.slurm.python)
    executor.update_parameters(**parameters(config, name=folder.name, max_jobs=max_jobs))
    return executor


LAUNCHER = Slurm()
