"""Number of tokens that the fused head processes at a time. No torch, so that memory is predicted by the same rule."""

import math

MIN_BUFFER_BYTES = 2**26
"""Least size of the chunks' buffers, for small heads."""


def chunk_size(vocab: int, hidden: int, *, num_tokens: int, most: int | None = None) -> int:
    """Return the tokens per chunk, about equal in all chunks; at least 1.

    Args:
        vocab: the vocabulary, or a rank's shard of it.
        most: limit of a chunk; None: its two float32 buffers [n, V] together take about as much as the weight's float32
            gradient, or MIN_BUFFER_BYTES. A third buffer, for training through capped logits, is not counted.
    """
    most = most or max(hidden // 2, MIN_BUFFER_BYTES // (2 * 4 * vocab), 1)
    return math.ceil(num_tokens / max(math.ceil(num_tokens / most), 1)) or 1
