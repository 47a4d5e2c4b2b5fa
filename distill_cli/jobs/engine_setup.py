"""What engines need that belong to no run's ranks: those of `distill serve` and `distill chat`. No torch."""

import os

from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Dtype
from distill_cli.engines.settings import CPU_KV_CACHE_BYTES
from distill_cli.launch.local import KEPT_MEMORY, SHORT_SPIN, bytecode_variables
from distill_cli.launch.nodes import node_variables
from distill_cli.memory import NoPrediction, read_shape
from distill_cli.models.model_files import CACHE_ONLY, ModelFiles


def engine_environment(cluster: ClusterConfig, *, on_gpus: bool) -> dict[str, str]:
    """Return what the engines' processes have besides this one's environment, as ranks have it."""
    defaults = {**SHORT_SPIN, **({} if on_gpus else KEPT_MEMORY), "TOKENIZERS_PARALLELISM": "false"}
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    device = {} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""}
    return {**unset, **bytecode_variables(), **node_variables(cluster), CACHE_ONLY: "1", **device}


def cpu_kv_cache(model: ModelFiles, *, dtype: Dtype, length: int) -> int:
    """Return the bytes of an engine's KV cache on a CPU: the usual ones, or those of the longest sequence."""
    try:
        keys = sum(layer.key for layer in read_shape(model.folder).layers)
    except NoPrediction:
        return CPU_KV_CACHE_BYTES
    token = 2 * keys * (4 if dtype is Dtype.float32 else 2)
    return max(CPU_KV_CACHE_BYTES, token * (length + 256) * 5 // 4)  # whole blocks, and a few that vLLM keeps
