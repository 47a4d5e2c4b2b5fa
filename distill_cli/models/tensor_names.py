"""Tell by their names which stored tensors are the text model's, and which belong to experts and routers. No torch."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import TypeVar

Value = TypeVar("Value")

LAYER = re.compile(r"\blayers\.(\d+)\.")
OTHER_PARTS = re.compile(
    r"vision|visual|image|video|audio|speech|projector|connector|merger|resampler|aligner|qformer|\bmtp"
)
"""Modules of other inputs, and of heads that predict several tokens, by a part of their name."""
NEXT_TOKENS = re.compile(r"\blayers\.(\d+)\.(?:eh_proj|enorm|hnorm|shared_head)\b")
"""Tensors of a layer that predicts several tokens and is numbered after the model's own (DeepSeek-V3, GLM-4.5)."""
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings|embeddings|tok_embeddings)\.weight$")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
EXPERT = re.compile(r"\.experts\.")
ROUTER = re.compile(r"\.(?:router|gate)\.")


def text_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """Return the tensors of the text model: those that a student is built from. The others stay as they are."""
    extra = {name[: match.end(1)] for name in tensors if (match := NEXT_TOKENS.search(name))}
    kept = {}
    for name, value in tensors.items():
        match = LAYER.search(name)
        is_extra = bool(extra and match and name[: match.end(1)] in extra)
        if not is_extra and not _is_other(name[: match.start()] if match else name):
            kept[name] = value
    return kept


@lru_cache(maxsize=1024)  # models with many experts have many tensors in few modules
def _is_other(outside_layers: str) -> bool:
    return bool(OTHER_PARTS.search(outside_layers))


def is_expert(name: str) -> bool:
    """Whether a tensor is one of an expert's own, or of all experts' stacked."""
    return bool(EXPERT.search(name))


def is_router(name: str) -> bool:
    """Whether a tensor is of the router that chooses experts."""
    return bool(ROUTER.search(name))
