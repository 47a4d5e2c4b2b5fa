"""What a Slurm cluster has and how its jobs stand, by Slurm's own commands; and whether its nodes see a folder.

One question to squeue answers for a whole array; how a run ended is in the run's own folder.
"""

import math
import os
import platform
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from distill_cli.config.choices import nearest
from distill_cli.errors import ConfigError, DistillError

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


class SlurmCluster:
    """The part of a `Launcher` that asks Slurm."""

    def __init__(self, ask: Callable[..., str] = ask) -> None:
        """`ask` runs a command and returns its output."""
        self.ask = ask

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Every partition by name. Raises ConfigError if Slurm does not answer."""
        partitions: dict[str, Partition] = {}
        for line in self.ask("sinfo", "-a", "-h", "-o", "%P|%a|%l|%D|%s|%G|%c").splitlines():
            star_name, state, max_time, num_nodes, job_size, gres, cpus = line.strip().split("|")
            name, most = star_name.removesuffix("*"), job_size.rpartition("-")[2]
            partition = partitions.setdefault(name, Partition(name, is_default=star_name.endswith("*")))
            partition.is_up = state == "up"
            partition.max_time_s = parse_time_limit(max_time) or math.inf
            partition.max_nodes = int(most) if most.isdigit() else math.inf
            partition.num_nodes += int(num_nodes)
            partition.gpus = max(partition.gpus, sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
            partition.cpus = min(partition.cpus or 10**9, int(cpus.rstrip("+")))
        return partitions

    @cached_property
    def max_array_size(self) -> int:
        """Jobs of an array, at most."""
        return int(re.findall(r"MaxArraySize\s*=\s*(\d+)", self.ask("scontrol", "show", "config"))[0])

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
        kind = file_system(path, mounts)
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

    def was_preempted(self, job_id: str | None) -> bool:
        """Return whether a job of higher priority is why this one must end."""
        return re.search(r"PreemptTime=\d", self.ask("scontrol", "show", "job", "-o", str(job_id))) is not None


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
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"


def file_system(path: Path, mounts: Mapping[str, str] | None = None) -> str:
    """Return the type of the file system that holds `path`: that of the longest mount point above it."""
    if mounts is None:  # the last mount at a point is the one on top
        mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next(mounts[str(folder)] for folder in (path, *path.parents) if str(folder) in mounts)
