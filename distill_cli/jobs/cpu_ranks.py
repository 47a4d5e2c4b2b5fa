"""How many ranks share this machine's cores, if it is left to distill: the number that trains fastest."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from distill_cli import memory as predictions
from distill_cli.config.schema import Config
from distill_cli.config.teachers import teacher_configs
from distill_cli.machine import hardware
from distill_cli.models import param_counts
from distill_cli.models.model_files import ModelFiles
from distill_cli.types import HiddenSize

SEQUENCES_OF_A_RANK = 16
"""A rank with fewer sequences of an update does not pay for what it does once a token and once a layer."""
SMALL_PARAMS = 30_000_000
"""Up to this many parameters a second thread of a rank waits more than it works (docs/performance.md)."""
ANSWERS_OF_A_RANK = 64
"""A rank of an evaluation with fewer answers costs more to start than it saves."""
PROCESS_BYTES = 2**30
"""What a rank's libraries hold, which predictions leave out."""


def best_ranks(
    config: Config, student: ModelFiles, teachers: Mapping[str, ModelFiles], hidden: Sequence[HiddenSize] = ()
) -> int:
    """Return the number of ranks for the cores of this machine that a run may use.

    A rank has one thread if the models are small: their operators are too short to be shared, and much of a step is
    Python, which one core runs. Larger models have one rank with all threads.

    Args:
        teachers: by name; none if no engine of them is needed.
        hidden: as in `memory.predict`.
    """
    mesh, engine = config.mesh, config.engine
    axes = mesh.replicate * mesh.context * mesh.tensor * mesh.expert
    shared = [one.engine.teacher.tensor_parallel for one in teacher_configs(config).values()]
    unit = math.lcm(axes, engine.student.tensor_parallel, *shared) or 1
    most = config.train.global_batch_size // SEQUENCES_OF_A_RANK
    numbers = _candidates(config, (student, *teachers.values()), most=most, unit=unit)
    return next((number for number in numbers if _fits(config, student, teachers, hidden, number)), 1)


def best_evaluation_ranks(config: Config, model: ModelFiles, *, role: str) -> int:
    """Return the number of ranks for an evaluation of a model with the engine of `role`, as `best_ranks`."""
    engine, section = getattr(config.engine, role), getattr(config.model, role)
    try:
        size = PROCESS_BYTES + predictions.engine_bytes(model.folder, section, engine, gpu_bytes=None)
    except predictions.NoPrediction:
        return 1
    most = min(hardware.host_memory() // size, config.eval.max_samples * config.eval.repeat // ANSWERS_OF_A_RANK)
    return next(_candidates(config, (model,), most=most, unit=engine.tensor_parallel), 1)


def _candidates(config: Config, models: Iterable[ModelFiles], *, most: int, unit: int) -> Iterator[int]:
    """Yield numbers of ranks above one, from `most` downwards; none for models that need all threads."""
    largest = max(param_counts.count(files.folder) for files in models)
    most = min(most, hardware.cores() // (config.cluster.parallel_jobs or 1))
    return (number for number in range(most, 1, -1) if largest <= SMALL_PARAMS and number % unit == 0)


def _fits(
    config: Config,
    student: ModelFiles,
    teachers: Mapping[str, ModelFiles],
    hidden: Sequence[HiddenSize],
    num_ranks: int,
) -> bool:
    device = predictions.Device(hardware.host_memory() - num_ranks * PROCESS_BYTES, False, num_ranks)
    folders = student.folder, {name: files.folder for name, files in teachers.items()}
    try:
        shape = predictions.read_shape(student.folder, config.model.student.lora)
        problem = predictions.problem(config, shape, *folders, num_ranks=num_ranks, device=device, hidden=hidden)
        return problem is None
    except predictions.NoPrediction:
        return False
