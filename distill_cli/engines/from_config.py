"""Read an engine's settings from the config. No torch and no vLLM."""

from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.engines.settings import Adapter, EngineSettings


def settings_of(
    config: Config, role: str, *, folder: Path, max_model_len: int, vocab_size: int | None, sleep_mode: bool
) -> EngineSettings:
    """Return the settings of `model.<role>` and `engine.<role>`, with what other facts decide as arguments.

    Args:
        folder: the model's.
        max_model_len, vocab_size, sleep_mode: see `EngineSettings`.
    """
    model, engine = getattr(config.model, role), getattr(config.engine, role)
    lora = getattr(model, "lora", None)
    return EngineSettings(
        path=str(folder),
        max_model_len=max_model_len,
        dtype=model.dtype.value,
        quantization=getattr(model, "quantization", None),
        trust_remote_code=config.model.trust_remote_code,
        vocab_size=vocab_size,
        tensor_parallel=engine.tensor_parallel,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_bytes=None if engine.kv_cache_gib is None else int(engine.kv_cache_gib * 2**30),
        enforce_eager=True if engine.enforce_eager else None,
        adapter=Adapter(lora.rank, lora.alpha) if lora and lora.syncs_adapter else None,
        sleep_mode=sleep_mode,
        seed=config.train.seed,
        kwargs=engine.kwargs,
    )
