"""Check requests before an engine sees them: each problem is one sentence with what, value and limit."""

import math
from collections.abc import Iterator

import numpy

from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.wire import BadBody, HeadRequest, SampleRequest, ScoreRequest

MOST_STOPS = 64
"""Strings or tokens that may end an answer."""


def check_score(request: ScoreRequest, info: ServerInfo) -> None:
    """Raise BadBody if the engines cannot score the sequences."""
    _raise_first(_score_problems(request, info))


def check_head(request: HeadRequest, info: ServerInfo) -> None:
    """Raise BadBody for rows that the model's head does not have, or too many of them."""
    num_rows = request.end - request.begin
    if request.end > info.vocab_size:
        raise BadBody(f"rows end at {request.end}, the head has {info.vocab_size}")
    if (size := num_rows * info.hidden_size * info.hidden_bytes) > info.max_answer_bytes:
        raise BadBody(f"the answer would have {size} bytes, the limit is {info.max_answer_bytes}; ask for fewer rows")


def check_sample(request: SampleRequest, info: ServerInfo) -> None:
    """Raise BadBody if the engines cannot answer the prompts."""
    _raise_first(_sample_problems(request, info))


def costs(request: ScoreRequest | SampleRequest, max_model_len: int) -> list[int]:
    """Return the tokens of each sequence; an answer counts as long as it may become."""
    lengths: list[int] = request.lengths.tolist()
    if isinstance(request, ScoreRequest):
        return lengths
    return [min(length + request.sampling.max_new_tokens, max_model_len) for length in lengths]


def _raise_first(problems: Iterator[str]) -> None:
    for problem in problems:  # those after it may rely on what it found broken
        raise BadBody(problem)


def _score_problems(request: ScoreRequest, info: ServerInfo) -> Iterator[str]:
    topk, starts = request.topk, request.response_starts
    if not 0 <= topk <= info.vocab_size:
        yield f"topk is {topk}, allowed are 1 to {min(info.max_topk, info.vocab_size)}, and 0 for hidden states"
    if topk > info.max_topk:
        yield f"topk is {topk}, this server allows 1 to {info.max_topk}; start it with --max-topk {topk}"
    if not 0 < request.temperature < math.inf:
        yield f"temperature is {request.temperature}, must be above 0 and finite"
    yield from _vocabulary_problems(request.vocab_size, info)
    if request.vocab_size is not None and topk > request.vocab_size:
        yield f"topk is {topk}, allowed are 1 to vocab_size={request.vocab_size}"
    yield from _sequence_problems(request, info, max_len=info.max_model_len)
    yield from _count_problems("response_starts", starts, request.lengths)
    if (wrong := numpy.flatnonzero((starts < 1) | (starts > request.lengths))).size:
        start, length = int(starts[wrong[0]]), int(request.lengths[wrong[0]])
        yield f"response {wrong[0]} starts at {start} in a sequence of {length} tokens, allowed are 1 to {length}"
    size = request.num_rows * (8 * topk + 4 if topk else info.hidden_size * info.hidden_bytes)
    if size > info.max_answer_bytes:
        fix = "send fewer sequences, or a smaller topk"
        yield f"the answer would have {size} bytes, the limit is {info.max_answer_bytes}; {fix}"


def _sample_problems(request: SampleRequest, info: ServerInfo) -> Iterator[str]:
    sampling = request.sampling
    limits = {
        "max_new_tokens": (sampling.max_new_tokens >= 1, "at least 1"),
        "temperature": (0 <= sampling.temperature <= 2, "from 0 to 2"),
        "top_p": (0 < sampling.top_p <= 1, "above 0 and at most 1"),
        "top_k": (0 <= sampling.top_k <= info.vocab_size, f"from 0 to {info.vocab_size}"),
        "stop": (len(sampling.stop) <= MOST_STOPS and all(sampling.stop), f"at most {MOST_STOPS}, none empty"),
        "stop_token_ids": (len(sampling.stop_token_ids) <= MOST_STOPS, f"at most {MOST_STOPS}"),
    }
    for name, (is_kept, rule) in limits.items():
        if not is_kept:
            yield f"sampling.{name} is {getattr(sampling, name)!r:.40}, must be {rule}"
    if any(not 0 <= token < info.vocab_size for token in sampling.stop_token_ids):
        yield f"sampling.stop_token_ids has ids outside 0 to {info.vocab_size - 1}"
    yield from _vocabulary_problems(request.vocab_size, info)
    yield from _sequence_problems(request, info, max_len=info.max_model_len - 1)
    yield from _count_problems("seeds", request.seeds, request.lengths)
    if (total := sum(costs(request, info.max_model_len))) > info.max_queued_tokens:
        rule = f"the limit is {info.max_queued_tokens}; send fewer prompts at once"
        yield f"prompts and answers may have {total} tokens, {rule}"


def _vocabulary_problems(vocab_size: int | None, info: ServerInfo) -> Iterator[str]:
    if vocab_size is not None and not 1 <= vocab_size <= info.vocab_size:
        yield f"vocab_size is {vocab_size}, allowed are 1 to {info.vocab_size}"


def _count_problems(name: str, values: numpy.ndarray, lengths: numpy.ndarray) -> Iterator[str]:
    if len(values) != len(lengths):
        yield f"{name} has {len(values)} entries, lengths has {len(lengths)}; there must be one a sequence"


def _sequence_problems(request: ScoreRequest | SampleRequest, info: ServerInfo, *, max_len: int) -> Iterator[str]:
    tokens, lengths = request.token_ids, request.lengths
    if not len(lengths):
        yield "lengths is empty; send at least one sequence"
    if (wrong := numpy.flatnonzero((lengths < 1) | (lengths > max_len))).size:
        yield f"sequence {wrong[0]} has {lengths[wrong[0]]} tokens, allowed are 1 to {max_len}"
    if (total := int(lengths.sum(dtype=numpy.int64))) != len(tokens):
        yield f"lengths add up to {total}, token_ids has {len(tokens)} entries"
    if total > info.max_queued_tokens:
        flag = "send fewer sequences at once, or start the server with a higher --max-queued-tokens"
        yield f"the sequences have {total} tokens, the limit is {info.max_queued_tokens}; {flag}"
    size = request.vocab_size or info.vocab_size
    if (outside := numpy.flatnonzero((tokens < 0) | (tokens >= size))).size:
        place = int(numpy.searchsorted(numpy.cumsum(lengths), outside[0], side="right"))
        yield f"sequence {place} has token id {tokens[outside[0]]}, allowed are 0 to {size - 1}"
