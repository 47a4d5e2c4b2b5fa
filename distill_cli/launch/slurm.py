"""Slurm, asked and told: what the cluster has, what a job's script says, submitting, how a job stands.

Submitting is submitit's: it writes the script and the pickled task, and gives them to sbatch. How a job stands is asked
of squeue here, one question for a whole array, and how a run ended is in the run's own folder.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from distill_cli.config.choices import nearest
from distill_cli.config.derived import parse_time_limit
from distill_cli.config.schema import ClusterConfig, Config
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, DistillError
from distill_cli.launch.shared import unshared
from distill_cli.machine import hardware


@dataclass
class Partition:
    """What sinfo says of one."""

    name: str
    is_default: bool = False
    is_up: bool = True
    max_time_s: float = math.inf
    max_nodes: float = math.inf
    """Of a job."""
    num_nodes: int = 0
    gpus: int = 0
    """Of a node; the most where they differ."""
    cpus: int = 0
    """Of a node; the fewest where they differ."""


@cache
def partitions() -> dict[str, Partition]:
    """Every partition by name.

    Raises:
        ConfigError: there is no Slurm here, or it does not answer.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "cluster.launcher=slurm: there is no sbatch here; run on a login node, or choose cluster=local"
        )
    found: dict[str, Partition] = {}
    for line in ask("sinfo", "-a", "-h", "-o", "%P|%a|%l|%D|%s|%G|%c").splitlines():
        name, is_up, max_time, num_nodes, job_size, gres, cpus = line.strip().split("|")
        is_default = name.endswith("*")
        name = name.removesuffix("*")
        partition = found.setdefault(name, Partition(name, is_default))
        partition.is_up = is_up == "up"
        partition.max_time_s = parse_time_limit(max_time) or math.inf
        most = job_size.rpartition("-")[2]
        partition.max_nodes = int(most) if most.isdigit() else math.inf
        partition.num_nodes += int(num_nodes)
        partition.gpus = max(partition.gpus, sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
        partition.cpus = min(partition.cpus or 10**9, int(cpus.rstrip("+")))
    return found


def ask(*command: str) -> str:
    """What a command of Slurm's prints. Raises ConfigError where it does not answer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"cluster.launcher=slurm: {command[0]} says: {_last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cluster.launcher=slurm: {command[0]} does not answer ({error}); is Slurm up?") from error


def partition_of(cluster: ClusterConfig) -> Partition:
    """The one that is asked for, or the default one.

    Raises:
        ConfigError: there is none.
    """
    known = partitions()
    if cluster.partition is None:
        for partition in known.values():
            if partition.is_default:
                return partition
        raise ConfigError(f"cluster.partition: this cluster has no default; choose one of {', '.join(known)}")
    first = cluster.partition.split(",")[0]
    for name in cluster.partition.split(","):
        if name not in known:
            raise ConfigError(
                f"cluster.partition={name}: no such partition{nearest(name, known)} (there are: {', '.join(known)})"
            )
    return known[first]


@cache
def max_array_size() -> int:
    """Jobs of an array, at most."""
    return int(re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))[1])


def settle(config: Config) -> Config:
    """Fill in what the cluster decides: GPUs and CPUs of a node. Raises ConfigError where they cannot be told."""
    cluster, partition = config.cluster, partition_of(config.cluster)
    gpus = cluster.gpus_per_node
    if gpus is None:
        gpus = 0 if hardware.has_cpu_vllm() else partition.gpus
    config = override(config, {"cluster.gpus_per_node": gpus})
    if cluster.cpus_per_node is None:
        share = gpus / partition.gpus if partition.gpus else 0
        cpus = max(int(partition.cpus * min(share, 1)), hardware.ranks_per_node(config))
        config = override(config, {"cluster.cpus_per_node": cpus})
    return config


def cluster_problems(config: Config) -> Iterator[str]:
    """What keeps the cluster from taking a job of this config, as far as it can be told before it is submitted."""
    cluster, partition = config.cluster, partition_of(config.cluster)
    where = f"partition {partition.name}"
    if not partition.is_up:
        yield f"cluster.partition={partition.name}: is down; choose another, or wait"
    most_nodes = min(partition.num_nodes, partition.max_nodes)
    if cluster.nodes > most_nodes:
        yield f"cluster.nodes={cluster.nodes}: {where} gives a job at most {most_nodes}; lower it, or choose another"
    limit = parse_time_limit(cluster.time) if cluster.time else None
    if limit is not None and limit > partition.max_time_s:
        most = f"{partition.max_time_s / 60:g} minutes"
        yield f"cluster.time={cluster.time}: {where} allows {most} at most; lower it, or choose another"
    if limit is not None and limit <= cluster.signal_s:
        yield (
            f"cluster.time={cluster.time}: not longer than the cluster.signal_s={cluster.signal_s} seconds before its "
            "end at which a run stops; raise it"
        )
    if (cluster.gpus_per_node or 0) > partition.gpus:
        yield (
            f"cluster.gpus_per_node={cluster.gpus_per_node}: a node of {where} has {partition.gpus}; lower it, or "
            "choose another"
        )
    if problem := unshared(Path(config.run.root), shared_folders=cluster.shared_folders, node_hosts=node_hosts):
        yield problem


def node_hosts() -> set[str]:
    """The machines that the nodes are."""
    return set(re.findall(r"NodeHostName=(\S+)", ask("scontrol", "show", "node", "-o")))


def parameters(config: Config, *, name: str, max_jobs: int | None = None) -> dict[str, Any]:
    """What submitit's Slurm executor takes for this config; `settle` has been called."""
    cluster = config.cluster
    extra = {str(key).replace("_", "-"): value for key, value in cluster.extra.items()}
    # One start is one attempt in the same folder: log files go on, and Slurm may start the job again.
    extra |= {"requeue" if cluster.max_requeues else "no-requeue": True}
    asks_for_gpus = {"gres", "gpus", "gpus-per-task", "gpus-per-node"} & extra.keys()
    cpus = f"--cpus-per-task={cluster.cpus_per_node}"  # srun no longer takes it from sbatch
    container = [
        f"--container-{key}" + ("" if value is True else f"={value}") for key, value in cluster.container.items()
    ]
    chosen = {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cluster.cpus_per_node,
        "gpus_per_node": (cluster.gpus_per_node or None) if not asks_for_gpus else None,
        "mem": cluster.mem,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "signal_delay_s": cluster.signal_s,
        "setup": list(cluster.setup) or None,
        "srun_args": ["--kill-on-bad-exit=1", cpus, *container],
        "additional_parameters": extra,
        "stderr_to_stdout": True,
        "wckey": None,
    }
    if max_jobs is not None:
        chosen["array_parallelism"] = cluster.array_parallelism or max_jobs
    return chosen


def executor(config: Config, folder: Path, *, name: str, max_jobs: int | None = None):
    """submitit's, ready to submit jobs of this config; their scripts, pickles and output go to `folder`."""
    import submitit

    made = submitit.SlurmExecutor(folder=folder, python=config.cluster.python)
    made.update_parameters(**parameters(config, name=name, max_jobs=max_jobs))
    return made


def script(config: Config, folder: Path, *, name: str, num_jobs: int = 1) -> str:
    """The text that sbatch would get."""
    made = executor(config, folder, name=name, max_jobs=num_jobs)
    if num_jobs > 1:
        made.parameters["map_count"] = num_jobs
    return made._make_submission_file_text(made._submitit_command_str, "")


def submit(config: Config, folder: Path, tasks: Sequence[Callable[[], Any]], *, name: str) -> list[str]:
    """Submits one job, or one array of several; the ids, `<job>` or `<job>_<index>`.

    Raises:
        ConfigError: Slurm refuses, and why.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    made = executor(config, folder, name=name, max_jobs=len(tasks))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it raises
            jobs = made.submit(tasks[0]) if len(tasks) == 1 else made.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(refusal(error)) from error
    return [job.job_id for job in ([jobs] if len(tasks) == 1 else jobs)]


def refusal(error: Exception) -> str:
    """Why sbatch did not take a job, of what submitit raises then."""
    reason = _last_line(str(error)).removeprefix("sbatch: error: ").removeprefix("Batch job submission failed: ")
    return f"Slurm refuses the job: {reason}"


def log_file(folder: Path, job_id: str) -> Path:
    """Where the first node's output goes."""
    return folder / f"{job_id}_0_log.out"


def active(*job_ids: str) -> dict[str, str]:
    """State by id of those jobs that have not ended, each element of an array by itself: one question for all."""
    arrays = sorted({job_id.partition("_")[0] for job_id in job_ids})
    # Slurm answers a question about a single job that it has forgotten with an error.
    asked = subprocess.run(
        ["squeue", "-h", "-r", "-j", ",".join(arrays), "-o", "%i|%T"], capture_output=True, text=True, timeout=120
    )
    if asked.returncode != 0 and "Invalid job id" not in asked.stderr:
        raise DistillError(f"squeue says: {_last_line(asked.stderr)}")
    states = dict(line.split("|") for line in asked.stdout.split())
    return {job_id: states[job_id] for job_id in job_ids if job_id in states}


def ended_as(job_id: str) -> str:
    """What the accounting says became of a job that is no longer active, in Slurm's words; "" where it cannot tell."""
    with contextlib.suppress(ConfigError):
        return ask("sacct", "-X", "-n", "-P", "-D", "-j", job_id, "-o", "State").strip().splitlines()[-1]
    return ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
