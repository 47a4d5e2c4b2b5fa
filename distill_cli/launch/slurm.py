"""Launch runs as Slurm jobs: scripts, submission, requeueing, and what the cluster has.

submitit writes the script, gives it to sbatch and starts a task on each node, which is `run_node_program`. A warning
(SIGUSR2, before the time limit) or a preemption lets the ranks save and queues the job again: the run goes on in the
same folder, as its next attempt. Any other SIGTERM is scancel's: the run stays down.

One question to squeue answers for a whole array; how a run ended is in the run's own folder.
"""

import importlib
import io
import math
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from distill_cli.config.choices import nearest
from distill_cli.config.schema import Config
from distill_cli.config.teacher_jobs import GPUS, job_config, job_key, teacher_nodes
from distill_cli.config.teachers import model_key
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError, DistillError, broken
from distill_cli.folders.run_dir import RunDir, SubmittedJob
from distill_cli.launch.base import NODE_PROGRAM, TEACHER_PROGRAM, Launcher, Place
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
LOCAL_FILE_SYSTEMS = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "vfat"),
    *("tmpfs", "ramfs", "overlay", "squashfs"),
}
"""Visible on one machine alone, unless it exports them."""


@dataclass
class Partition:
    """One line of sinfo, or several if its nodes differ."""

    name: str
    is_default: bool = False
    is_up: bool = True
    max_time_s: float = math.inf
    default_time_s: float = math.inf
    """Time limit of a job that asks for none."""
    max_nodes: float = math.inf
    """Nodes of one job, at most."""
    num_nodes: int = 0
    gpus: int = 0
    """GPUs of a node; the most if nodes differ."""
    cpus: int = 0
    """CPUs of a node; the fewest if nodes differ."""

    def __str__(self) -> str:
        size = f"{self.gpus} GPUs" if self.gpus else f"{self.cpus} CPUs"
        return f"{self.num_nodes} nodes of {size}" + ", the default" * self.is_default + ", down" * (not self.is_up)


def ask(*command: str) -> str:
    """Return the output of a Slurm command. Raises ConfigError if it fails, or there is no Slurm here."""
    key, program = "cluster.launcher=slurm", command[0]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except FileNotFoundError as error:
        fix = "run on a login node, or choose cluster=local"
        raise ConfigError(f"{key}: there is no {program} here; {fix}") from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"{key}: {program} fails: {last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{key}: {program} does not answer ({error}); is Slurm up?") from error


def run_node_program(run: str) -> None:
    """Do the task of a node."""
    if status := importlib.import_module(NODE_PROGRAM).carry_out(Path(run)):
        sys.exit(status)


def run_teacher_program(run: str, name: str) -> None:
    """Do the task of a node of a teacher's job."""
    if status := importlib.import_module(TEACHER_PROGRAM).serve_teacher(Path(run), name):
        sys.exit(status)


class Slurm(Launcher):
    name = "slurm"
    serves_teachers = True
    task: Callable[[str], None] = staticmethod(run_node_program)
    """What each node of a job does with the run's folder."""
    teacher_task: Callable[[str, str], None] = staticmethod(run_teacher_program)
    """What each node of a teacher's job does with the run's folder and the teacher's name."""

    def __init__(self, ask: Callable[..., str] = ask) -> None:
        """`ask` runs a command and returns its output."""
        self.ask = ask

    def resolve(self, config: Config) -> Config:
        resolved = self._with_sizes(config)
        with suppress(ConfigError):  # which `config_problems` raises
            for name in teacher_nodes(config):  # all of these jobs have the same sizes
                cluster = self._with_sizes(job_config(config, name)).cluster
                sizes = {GPUS: cluster.gpus_per_node, "cpus_per_node": cluster.slurm.cpus_per_node}
                own = {**config.cluster.slurm.teacher, **sizes}
                return override(resolved, {"cluster.slurm.teacher": own})
        return resolved

    def _with_sizes(self, config: Config) -> Config:
        """Fill in GPUs and CPUs of a node; nothing if Slurm does not answer."""
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
        cluster, settings, at = config.cluster, config.cluster.slurm, "cluster.slurm"
        for name in sorted(RESERVED_SBATCH & {str(key).replace("_", "-") for key in settings.extra}):
            yield f"{at}.extra.{name}: is set by distill, which relies on it; leave it out"
        limit = math.inf if settings.time is None else parse_time_limit(settings.time)
        typed, signal_s, grace_s = f"{at}.time={settings.time}", settings.signal_s, cluster.grace_s
        yield from broken(
            (limit is None, f"{typed}: must be minutes, HH:MM:SS or D-HH:MM:SS"),
            (limit and limit <= signal_s, f"{typed}: must exceed {at}.signal_s={signal_s} seconds; raise it"),
            (signal_s < grace_s, f"{at}.signal_s={signal_s}: saving may take cluster.grace_s={grace_s:g} s; raise it"),
            (any("\n" in line for line in settings.setup), f"{at}.setup: an element is one line; give several"),
        )
        partition = self.find_partition(settings.partition)
        gpus, nodes = cluster.gpus_per_node or 0, min(partition.num_nodes, partition.max_nodes)
        minutes, is_too_long = partition.max_time_s / 60, settings.time and (limit or 0) > partition.max_time_s
        where, fix = f"partition {partition.name}", "lower it, or choose another"
        default_s, least = partition.default_time_s, f"it must exceed {at}.signal_s={signal_s} seconds"
        is_too_short = settings.time is None and default_s <= signal_s
        yield from broken(
            (is_too_short, f"{at}.time: {where} gives {default_s / 60:g} minutes where none is asked for; {least}"),
            (not partition.is_up, f"{at}.partition={partition.name}: is down; choose another, or wait"),
            (cluster.nodes > nodes, f"cluster.nodes={cluster.nodes}: {where} gives a job at most {nodes}; {fix}"),
            (is_too_long, f"{typed}: {where} allows {minutes:g} minutes; {fix}"),
            (gpus > partition.gpus, f"cluster.gpus_per_node={gpus}: a node of {where} has {partition.gpus}; {fix}"),
        )
        if problem := self.unshared(Path(config.run.root), settings.shared_folders):
            yield problem
        if num_jobs > 1:
            size = re.findall(r"MaxArraySize\s*=\s*(\d+)", self.ask("scontrol", "show", "config"))[0]
            if num_jobs > int(size):
                yield f"a sweep of {num_jobs} runs: an array of this cluster holds {size}; make several sweeps"

    def teacher_problems(self, config: Config, name: str) -> Iterator[str]:
        own, model = config.cluster.slurm.teacher, model_key(name)
        try:
            problems = list(self.problems(job_config(config, name)))
        except ConfigError as error:
            problems = list(error.problems)
        for problem in problems:
            shown = job_key(problem, own=own, model=model)
            yield shown if shown != problem else f"{problem} (for the job of {model})"

    def teacher_script(self, config: Config, name: str, *, folder: Path) -> str:
        executor = make_teacher_executor(config, name, folder)
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def script(self, resolved: ResolvedRun, *, folder: Path, num_jobs: int = 1) -> str:
        after = [f"<{name}>" for name in teacher_nodes(resolved.config)]  # stands for the id of that job
        executor = make_executor(resolved.config, folder, max_jobs=num_jobs, after=after)
        if num_jobs > 1:
            executor.parameters["map_count"] = num_jobs
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def submit(
        self, config: Config, runs: Sequence[RunDir], *, folder: Path, after: Sequence[str] = ()
    ) -> list[SubmittedJob]:
        executor = make_executor(config, folder, max_jobs=len(runs), after=after)
        paths = [str(run.path) for run in runs]
        with refusals():
            jobs = executor.map_array(self.task, paths) if runs[1:] else [executor.submit(self.task, *paths)]
        return [self._submitted(job.job_id, folder) for job in jobs]

    def submit_teacher(self, config: Config, name: str, run: RunDir) -> SubmittedJob:
        executor = make_teacher_executor(config, name, run.path)
        with refusals():
            job = executor.submit(self.teacher_task, str(run.path), name)
        return self._submitted(job.job_id, run.path)

    def _submitted(self, job_id: str, folder: Path) -> SubmittedJob:
        return SubmittedJob(self.name, job_id, str(folder / self.name / f"{job_id}_0_log.out"))

    def cancel(self, job_ids: Sequence[str]) -> None:
        with suppress(ConfigError):  # Slurm has forgotten the job
            self.ask("scancel", *job_ids)

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

    def teacher_address(self) -> str:
        import submitit

        here = submitit.JobEnvironment()
        return self.address(here.hostnames[here.node])

    def check_restarts(self, config: Config, place: Place) -> None:
        """Slurm counts starts after preemptions and lost nodes too, and has no limit of its own."""
        if (count := place.num_restarts) > (most := config.cluster.slurm.max_requeues):
            limit = f"cluster.slurm.max_requeues={most}"
            raise DistillError(f"started again {count} times, more than {limit}; distill resume goes on")

    def requeue(self, config: Config, place: Place, *, reason: str) -> None:
        shown = self.ask("scontrol", "show", "job", "-o", str(place.job_id)) if reason == signal.SIGTERM.name else ""
        if reason != signal.SIGUSR2.name and not re.search(r"PreemptTime=\d", shown):  # by a job of higher priority
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

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Every partition by name. Raises ConfigError if Slurm does not answer."""
        partitions: dict[str, Partition] = {}
        for line in self.ask("sinfo", "-a", "-h", "-o", "%P|%a|%l|%L|%D|%s|%G|%c").splitlines():
            star_name, state, max_time, default_time, num_nodes, job_size, gres, cpus = line.strip().split("|")
            name, most = star_name.removesuffix("*"), job_size.rpartition("-")[2]
            partition = partitions.setdefault(name, Partition(name, is_default=star_name.endswith("*")))
            partition.is_up = state == "up"
            partition.max_time_s = parse_time_limit(max_time) or math.inf
            partition.default_time_s = parse_time_limit(default_time) or partition.max_time_s
            partition.max_nodes = int(most) if most.isdigit() else math.inf
            partition.num_nodes += int(num_nodes)
            partition.gpus = max(partition.gpus, sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
            partition.cpus = min(partition.cpus or 10**9, int(cpus.rstrip("+")))
        return partitions

    def find_partition(self, names: str | None) -> Partition:
        """Return the first of the named partitions (separated by commas), or the default one.

        Raises:
            ConfigError: one of them does not exist, or there is no default.
        """
        known = self.partitions
        names = names or next((name for name, one in known.items() if one.is_default), None)
        if names is None:
            raise ConfigError(f"cluster.slurm.partition: this cluster has no default; choose one of {', '.join(known)}")
        for name in names.split(","):
            if name not in known:
                what = f"no such partition{nearest(name, known)} (there are: {', '.join(known)})"
                raise ConfigError(f"cluster.slurm.partition={name}: {what}")
        return known[names.split(",")[0]]

    @cached_property
    def node_hosts(self) -> set[str]:
        """Host names of the nodes' machines."""
        return set(re.findall(r"NodeHostName=(\S+)", self.ask("scontrol", "show", "node", "-o")))

    def unshared(
        self, folder: Path, shared_folders: Sequence[str] | None, mounts: Mapping[str, str] | None = None
    ) -> str | None:
        """Return why the nodes will not see what is written under `folder`, as a problem of run.root; None if they do.

        Args:
            shared_folders: folders that all nodes see; None guesses by the file system's type.
            mounts: type by mount point; None reads this machine's.
        """
        path = folder.absolute().resolve()
        if shared_folders is not None:
            if any(path.is_relative_to(Path(os.path.expandvars(shared)).resolve()) for shared in shared_folders):
                return None
            listed = f"cluster.slurm.shared_folders: {', '.join(shared_folders) or 'none'}"
            return f"run.root={folder}: not in a folder that all nodes see ({listed}); choose another run.root"
        if mounts is None:  # the last mount at a point is the one on top
            mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
        kind = next(mounts[str(point)] for point in (path, *path.parents) if str(point) in mounts)
        if kind not in LOCAL_FILE_SYSTEMS or self.node_hosts <= {platform.node().split(".")[0], platform.node()}:
            return None
        what = f"on a {kind} file system of this machine, which other nodes do not see"
        return f"run.root={folder}: {what}; choose a shared one, or name it in cluster.slurm.shared_folders if they do"

    def address(self, host: str) -> str:
        """Return how to reach a node: its name if that resolves, else the address that Slurm knows."""
        try:
            socket.getaddrinfo(host, None)
            return host
        except socket.gaierror:
            return str(re.findall(r"NodeAddr=(\S+)", self.ask("scontrol", "show", "node", "-o", host))[0])

    def is_installed(self) -> bool:
        return shutil.which("squeue") is not None

    def status(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the states of those jobs that have not ended, each element of an array by itself."""
        arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
        try:
            lines = self.ask("squeue", "-h", "-r", "-j", arrays, "-o", "%i|%T").split()
        except ConfigError as error:
            if "Invalid job id" in str(error):  # the answer about a single job that Slurm has forgotten
                return {}
            raise DistillError(str(error)) from error
        states = dict(line.split("|") for line in lines)
        return {job_id: states[job_id] for job_id in job_ids if job_id in states}

    def end_state(self, job_id: str) -> str:
        """Return the state of a job that has ended in the accounting; "" if there is none."""
        with suppress(ConfigError, IndexError):
            return self.ask("sacct", "-X", "-n", "-P", "-D", "-j", job_id, "-o", "State").strip().splitlines()[-1]
        return ""


@contextmanager
def refusals() -> Iterator[None]:
    """Raise ConfigError if Slurm refuses a job that is submitted in the block."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with redirect_stderr(io.StringIO()):  # submitit prints what it raises
            yield
    except (FailedJobError, FailedSubmissionError) as error:
        reason = last_line(str(error)).removeprefix("sbatch: error: ")
        raise ConfigError(f"Slurm refuses the job: {reason.rpartition(' failed: ')[2]}") from error


def parameters(config: Config, *, name: str, max_jobs: int, after: Sequence[str] = ()) -> dict[str, Any]:
    """Return the parameters of submitit's Slurm executor for a resolved config; see `Launcher.submit` for `after`."""
    cluster, settings = config.cluster, config.cluster.slurm
    extra = {str(key).replace("_", "-"): value for key, value in settings.extra.items()}
    # One start is one attempt in the same folder: log files go on, and Slurm may start the job again.
    extra |= {"requeue" if settings.max_requeues else "no-requeue": True}
    if after:
        given = [str(extra["dependency"])] if "dependency" in extra else []
        extra |= {"dependency": ",".join([*given, f"after:{':'.join(after)}"])}
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


def make_executor(
    config: Config, folder: Path, *, max_jobs: int, name: str | None = None, after: Sequence[str] = ()
) -> Any:
    """Return submitit's executor for jobs of this config; scripts, pickles and output go to `folder`/slurm.

    Args:
        name: of the jobs; None is the folder's.
        after: see `Launcher.submit`.
    """
    import submitit

    executor = submitit.SlurmExecutor(folder=folder / Slurm.name, python=config.cluster.slurm.python)
    executor.update_parameters(**parameters(config, name=name or folder.name, max_jobs=max_jobs, after=after))
    return executor


def make_teacher_executor(config: Config, name: str, folder: Path) -> Any:
    """Return submitit's executor for the job of a teacher of the run in a folder."""
    return make_executor(job_config(config, name), folder, max_jobs=1, name=f"{folder.name}_{name}")


def parse_time_limit(text: str) -> float | None:
    """Parse M, M:S, H:M:S, D-H, D-H:M or D-H:M:S to seconds; infinite if unlimited, None if malformed."""
    if text.lower() in ("infinite", "unlimited"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, first, second, third = (int(field or 0) for field in match.groups())
    is_hours = match[1] is not None or match[4] is not None  # else the first field is minutes
    hours, minutes, seconds = (first, second, third) if is_hours else (0, first, second)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2].strip() or "nothing"


LAUNCHER = Slurm()
