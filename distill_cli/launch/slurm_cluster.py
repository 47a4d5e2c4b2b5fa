"""What a Slurm cluster has and how its jobs stand, by Slurm's own commands.

How a job stands is one question to squeue for a whole array; how a run ended is in the run's own folder.
"""

from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

from distill_cli.config.choices import nearest
from distill_cli.errors import ConfigError, DistillError


@dataclass
class Partition:
    """One line, or several, of sinfo."""

    name: str
    is_default: bool = False
    is_up: bool = True
    max_time_s: float = math.inf
    max_nodes: float = math.inf
    """Of a job."""
    num_nodes: int = 0
    gpus: int = 0
    """Of a node; the most if nodes differ."""
    cpus: int = 0
    """Of a node; the fewest if nodes differ."""


def ask(*command: str) -> str:
    """Return what a command of Slurm's prints. Raises ConfigError if it fails, or there is no Slurm here."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except FileNotFoundError as error:
        raise ConfigError(
            f"cluster.launcher=slurm: there is no {command[0]} here; run on a login node, or choose cluster=local"
        ) from error
    except subprocess.CalledProcessError as error:
        raise ConfigError(f"cluster.launcher=slurm: {command[0]} says: {last_line(error.stderr)}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cluster.launcher=slurm: {command[0]} does not answer ({error}); is Slurm up?") from error


class SlurmCluster:
    """The part of a `Launcher` that asks."""

    def __init__(self, ask: Callable[..., str] = ask) -> None:
        """`ask` runs a command and returns its output."""
        self.ask = ask

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Every partition by name. Raises ConfigError if Slurm does not answer."""
        partitions: dict[str, Partition] = {}
        for line in self.ask("sinfo", "-a", "-h", "-o", "%P|%a|%l|%D|%s|%G|%c").splitlines():
            name, is_up, max_time, num_nodes, job_size, gres, cpus = line.strip().split("|")
            is_default = name.endswith("*")
            name = name.removesuffix("*")
            partition = partitions.setdefault(name, Partition(name, is_default))
            partition.is_up = is_up == "up"
            partition.max_time_s = parse_time_limit(max_time) or math.inf
            most = job_size.rpartition("-")[2]
            partition.max_nodes = int(most) if most.isdigit() else math.inf
            partition.num_nodes += int(num_nodes)
            partition.gpus = max(partition.gpus, sum(map(int, re.findall(r"gpu(?::[^:,()]+)?:(\d+)", gres))))
            partition.cpus = min(partition.cpus or 10**9, int(cpus.rstrip("+")))
        return partitions

    @cached_property
    def max_array_size(self) -> int:
        """Jobs of an array, at most."""
        return int(re.search(r"MaxArraySize\s*=\s*(\d+)", self.ask("scontrol", "show", "config"))[1])

    def find_partition(self, names: str | None) -> Partition:
        """Return the first of the partitions that are asked for, or the default one.

        Raises:
            ConfigError: one of them does not exist, or there is no default.
        """
        known = self.partitions
        for name in names.split(",") if names is not None else ():
            if name not in known:
                raise ConfigError(
                    f"cluster.slurm.partition={name}: no such partition{nearest(name, known)} "
                    f"(there are: {', '.join(known)})"
                )
        if names is not None:
            return known[names.split(",")[0]]
        for partition in known.values():
            if partition.is_default:
                return partition
        raise ConfigError(f"cluster.slurm.partition: this cluster has no default; choose one of {', '.join(known)}")

    @cached_property
    def node_hosts(self) -> set[str]:
        """The machines that the nodes are."""
        return set(re.findall(r"NodeHostName=(\S+)", self.ask("scontrol", "show", "node", "-o")))

    def address(self, host: str) -> str:
        """Return how a node is reached: by its name if that resolves, else by the address that Slurm knows."""
        try:
            socket.getaddrinfo(host, None)
            return host
        except socket.gaierror:
            return re.search(r"NodeAddr=(\S+)", self.ask("scontrol", "show", "node", "-o", host))[1]

    def is_installed(self) -> bool:
        return shutil.which("squeue") is not None

    def status(self, job_ids: Sequence[str]) -> dict[str, str]:
        """Return the states of those jobs that have not ended, each element of an array by itself."""
        arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in job_ids}))
        try:
            lines = self.ask("squeue", "-h", "-r", "-j", arrays, "-o", "%i|%T").split()
        except ConfigError as error:
            if "Invalid job id" in str(error):  # so it answers about a single job that it has forgotten
                return {}
            raise DistillError(str(error)) from error
        states = dict(line.split("|") for line in lines)
        return {job_id: states[job_id] for job_id in job_ids if job_id in states}

    def end_state(self, job_id: str) -> str:
        """Return what the accounting says became of a job that is no longer active; "" if it cannot tell."""
        with suppress(ConfigError, IndexError):
            return self.ask("sacct", "-X", "-n", "-P", "-D", "-j", job_id, "-o", "State").strip().splitlines()[-1]
        return ""

    def was_preempted(self, job_id: str) -> bool:
        """Return whether a job of higher priority is why this one was asked to end."""
        return re.search(r"PreemptTime=\d", self.ask("scontrol", "show", "job", "-o", job_id)) is not None


def parse_time_limit(text: str) -> float | None:
    """Parse M, M:S, H:M:S, D-H, D-H:M or D-H:M:S to seconds; infinite if unlimited, None if malformed."""
    if text.lower() in ("infinite", "unlimited"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *fields = (int(field) if field is not None else None for field in match.groups())
    if days is not None or None not in fields:
        hours, minutes, seconds = (field or 0 for field in fields)
    else:
        hours, minutes, seconds = 0, fields[0], fields[1] or 0
    return float((((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds) or None


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
