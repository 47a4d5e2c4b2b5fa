"""Settings of an engine and of its sampling. No torch and no vLLM at import time."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CPU_KV_CACHE_BYTES = 256 << 20
"""Default KV cache of an engine on a CPU: it is resident from the start, for both engines of every rank."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM can reserve memory for."""
VOCABULARY_PADDING = 64
"""vLLM rounds a vocabulary up to a multiple of it before it is cut."""


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter that an engine adds to its weights: W x + alpha / rank B A x."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class EngineSettings:
    """One engine: a model, its precision and its memory."""

    path: str
    """A model's folder."""
    max_model_len: int
    """Tokens of the longest sequence, prompt and response together."""
    dtype: str = "bfloat16"
    """Type of the weights and the KV cache: `bfloat16`, `float16` or `float32`."""
    quantization: str | None = None
    """vLLM's name of a quantization; None is that of the model's config.json."""
    trust_remote_code: bool = False
    tensor_parallel: int = 1
    """Consecutive ranks that share one engine. All of them call it with the same requests in the same order, and get
    the same results; rank r belongs to engine r // tensor_parallel."""
    gpu_memory_utilization: float = 0.4
    """Share of a GPU's memory for weights, activations and KV cache: two engines and a trainer live on one device."""
    kv_cache_bytes: int | None = None
    """KV cache; None is what is left under `gpu_memory_utilization` on a GPU and `CPU_KV_CACHE_BYTES` on a CPU."""
    enforce_eager: bool | None = None
    """Run without CUDA graphs and compilation; None is False on a GPU, True on a CPU, where compiling takes longer
    than a short run."""
    sleep_mode: bool = False
    """Give memory back between uses (`sleep`, `wake`). On CUDA vLLM allows one such engine in a process."""
    adapter: Adapter | None = None
    """The sampler's, if `sync` brings an adapter instead of weights."""
    vocab_size: int | None = None
    """First id that is neither sampled nor scored, as the other model of the pair does not have it. None is all."""
    untouched: tuple[str, ...] = ()
    """Tensors of the files that no sync brings, as the student does not have them."""
    seed: int = 0
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Passed to `vllm.LLM` as they are; they override everything that the fields above imply."""


@dataclass(frozen=True)
class SamplingSettings:
    """How a model samples its answers."""

    max_new_tokens: int
    """Tokens of the longest response; fewer if prompt and response would exceed the engine's `max_model_len`."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is the whole vocabulary."""
    stop: tuple[str, ...] = ()
    """Strings that end a response. They need the engine's tokenizer, and slow sampling down: text is decoded."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """Continue after end-of-sequence tokens: for benchmarks."""
    logp: bool = True
    """Fill in `Sample.logp`, which training reads; answers that are only verified come faster without."""


def tensor_parallel_problem(size: int, *, model: Mapping[str, Any], num_ranks: int) -> str | None:
    """Return why `size` ranks cannot share an engine, as text that follows a key; None if they can.

    Args:
        model: its config.json; sizes that it does not contain are left to vLLM.
        num_ranks: those of a node, since an engine does not span nodes.
    """
    text = model.get("text_config") or model
    vocab_size = text.get("vocab_size")
    parts: dict[str, Any] = {
        "ranks of a node": num_ranks,
        "attention heads": text.get("num_attention_heads"),
        "the MLP's size": text.get("intermediate_size"),
        "the padded vocabulary": vocab_size and -(-vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING,
    }
    kv_heads = text.get("num_key_value_heads") or size  # beyond their number each rank has a copy of one

    def misfits(size: int) -> list[str]:
        found = [f"{name} ({number})" for name, number in parts.items() if number and number % size]
        return found + ([f"key-value heads ({kv_heads})"] if kv_heads % size and size % kv_heads else [])

    if size < 1:
        return "must be at least 1"
    if not misfits(size):
        return None
    sizes = [other for other in range(1, num_ranks + 1) if not misfits(other)]
    return f"does not divide {', '.join(misfits(size))}; choose one of {', '.join(map(str, sizes))}"
