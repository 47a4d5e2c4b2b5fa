"""What a scoring server and its clients exchange: safetensors bodies, numbers in their metadata. No torch.

| body           | tensors                                                    | metadata                            |
|----------------|------------------------------------------------------------|-------------------------------------|
| POST /score    | token_ids int32 [N], lengths int32 [S], response_starts    | topk, temperature, vocab_size (may  |
|                | int32 [S]                                                  | be left out)                        |
| its answer     | topk_ids int32 [R, K], topk_logp float32 [R, K],           |                                     |
|                | sampled_logp float32 [R]; with topk=0 hidden states:       |                                     |
|                | `hidden.<dtype>` [R, H], bfloat16 by its bits, uint16      |                                     |
| POST /head     | rows int64 [2]: ids from, and up to                        |                                     |
| its answer     | `weight.<dtype>` [V, H], `bias.<dtype>` [V] if there is    | scale, soft_cap (0 is none)         |
| POST /sample   | token_ids int32 [N], lengths int32 [S], seeds int64 [S]    | sampling (SamplingSettings as JSON),|
|                |                                                            | vocab_size (may be left out)        |
| its answer     | token_ids int32 [R], lengths int32 [S], stopped uint8 [S], |                                     |
|                | logp float32 [R], with `sampling.logp` alone               |                                     |

Shape letters: N tokens of all sequences end to end, S sequences, R response tokens of all sequences end to end, K the
top-k. A body is the header's size (8 bytes, little-endian), the header in JSON and the tensors' bytes (the README of
huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate, pairwise
from typing import Any

import numpy

from distill_cli.engines.settings import SamplingSettings

API = 1
"""Version of the routes and bodies; a client refuses a server with another."""
PRODUCT = "distill"
TOKEN = "DISTILL_SERVER_TOKEN"
"""Environment variable of server and client: the token that every request must carry."""
CLIENT_HEADER = "x-distill-client"
"""Header with the name of a client; clients take turns. Without it the peer's address is the name."""

Arrays = dict[str, numpy.ndarray]
DTYPES = {
    "U16": numpy.uint16,
    "F16": numpy.float16,
    "I32": numpy.int32,
    "I64": numpy.int64,
    "F32": numpy.float32,
    "U8": numpy.uint8,
}
DTYPE_NAMES = {numpy.dtype(dtype): name for name, dtype in DTYPES.items()}
SIZE_BYTES = 8
MOST_HEADER_BYTES = 2**16


def token_problem(token: str) -> str | None:
    """Return why no request can carry a token, without it; None if one can."""
    if token.isascii() and token.isprintable() and token.strip() == token and token:
        return None
    return f"{TOKEN}: is empty, or has characters that no header may have; set another"


class BadBody(Exception):
    """A body is not what its route takes; the message is one sentence: what, value, rule."""


def pack(parts: Mapping[str, Sequence[numpy.ndarray]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a body. The arrays of each tensor are put end to end; none of them is copied twice."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    buffers, end = list[Any](), 0
    for name, arrays in parts.items():
        begin, end = end, end + sum(array.nbytes for array in arrays)
        shape = [sum(map(len, arrays)), *arrays[0].shape[1:]]
        header[name] = {"dtype": DTYPE_NAMES[arrays[0].dtype], "shape": shape, "data_offsets": [begin, end]}
        buffers += [numpy.ascontiguousarray(array).view(numpy.uint8).data for array in arrays if array.size]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight
    return b"".join([len(text).to_bytes(SIZE_BYTES, "little"), text, *buffers])


def unpack(body: bytes | bytearray) -> tuple[Arrays, dict[str, str]]:
    """Return the tensors of a body, which are views of it, and its metadata. Raises BadBody if it is damaged."""
    begins_at = SIZE_BYTES + int.from_bytes(body[:SIZE_BYTES], "little")
    if len(body) < SIZE_BYTES or not SIZE_BYTES < begins_at <= min(len(body), SIZE_BYTES + MOST_HEADER_BYTES):
        raise BadBody(f"the body of {len(body)} bytes is not in the format of safetensors")
    try:
        header = json.loads(bytes(body[SIZE_BYTES:begins_at]))
        metadata = header.pop("__metadata__", {})
        entries = sorted((entry["data_offsets"], name, entry) for name, entry in header.items())
        end = max((end for (_, end), *_ in entries), default=0)
        if begins_at + end != len(body):
            raise BadBody(f"the body has {len(body)} bytes, its header describes {begins_at + end}")
        arrays, end_before = Arrays(), 0
        for (begin, end), name, entry in entries:
            dtype, shape = numpy.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
            is_whole = all(type(size) is int and size >= 0 for size in shape)
            if not is_whole or begin != end_before or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} cannot be at bytes {begin} to {end}")
            arrays[name] = numpy.frombuffer(body, dtype, math.prod(shape), begins_at + begin).reshape(shape)
            end_before = end
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata is not text")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadBody(f"the safetensors header of the body cannot be read ({error!r:.100})") from error
    return arrays, metadata


def take(arrays: Arrays, **expected: tuple[type, int]) -> list[numpy.ndarray]:
    """Return the arrays with these names, dtypes and numbers of dimensions. Raises BadBody if there are others."""
    if arrays.keys() != expected.keys():
        raise BadBody(f"the tensors are {', '.join(sorted(arrays)) or 'none'}, must be {', '.join(sorted(expected))}")
    for name, (dtype, num_dims) in expected.items():
        found, rule = arrays[name], f"{numpy.dtype(dtype).name} with {num_dims} dimension{'s' * (num_dims > 1)}"
        if (found.dtype, found.ndim) != (numpy.dtype(dtype), num_dims):
            raise BadBody(f"{name} is {found.dtype.name} of shape {list(found.shape)}, must be {rule}")
    return [arrays[name] for name in expected]


def number(metadata: Mapping[str, str], name: str, kind: type[int] | type[float]) -> Any:
    """Return a number of the metadata. Raises BadBody if it is absent or none."""
    try:
        return kind(metadata[name])
    except KeyError:
        raise BadBody(f"the metadata lacks {name}") from None
    except ValueError:
        raise BadBody(f"{name} is {metadata[name]!r:.40}, must be a number") from None


@dataclass(frozen=True)
class ScoreRequest:
    """Sequences to score."""

    token_ids: numpy.ndarray
    """int32 [N]"""
    lengths: numpy.ndarray
    """int32 [S]"""
    response_starts: numpy.ndarray
    """int32 [S]"""
    topk: int
    """Tokens at each position; 0 for hidden states instead."""
    temperature: float
    vocab_size: int | None = None

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], response_starts: Sequence[int], **options: Any) -> ScoreRequest:
        starts = numpy.array(response_starts, dtype=numpy.int32)
        return cls(*end_to_end(sequences), starts, **options)

    @classmethod
    def parse(cls, body: bytes | bytearray) -> ScoreRequest:
        """Return the request in a body. Raises BadBody; values are not checked."""
        arrays, metadata = unpack(body)
        one = (numpy.int32, 1)
        tokens, lengths, starts = take(arrays, token_ids=one, lengths=one, response_starts=one)
        vocab_size = number(metadata, "vocab_size", int) if "vocab_size" in metadata else None
        topk, temperature = number(metadata, "topk", int), number(metadata, "temperature", float)
        return cls(tokens, lengths, starts, topk, temperature, vocab_size)

    def body(self) -> bytes:
        metadata = {"topk": str(self.topk), "temperature": repr(float(self.temperature)), **_limit(self.vocab_size)}
        names = ("token_ids", "lengths", "response_starts")
        return pack({name: [getattr(self, name)] for name in names}, metadata)

    def part(self, begin: int, end: int) -> ScoreRequest:
        """Return the request of some of its sequences."""
        tokens = slice(int(self.lengths[:begin].sum()), int(self.lengths[:end].sum()))
        some = self.token_ids[tokens], self.lengths[begin:end], self.response_starts[begin:end]
        return ScoreRequest(*some, self.topk, self.temperature, self.vocab_size)

    @property
    def num_rows(self) -> int:
        """Number of response tokens, R."""
        return int(self.lengths.sum() - self.response_starts.sum())


@dataclass(frozen=True)
class HeadRequest:
    """Rows of the model's head."""

    begin: int
    end: int

    @classmethod
    def parse(cls, body: bytes | bytearray) -> HeadRequest:
        """Return the request in a body. Raises BadBody."""
        (rows,) = take(unpack(body)[0], rows=(numpy.int64, 1))
        if len(rows) != 2 or not 0 <= rows[0] < rows[1]:
            raise BadBody(f"rows is {rows.tolist()!r:.60}, must be two ids of which the second is larger")
        return cls(int(rows[0]), int(rows[1]))

    def body(self) -> bytes:
        return pack({"rows": [numpy.array([self.begin, self.end], dtype=numpy.int64)]})


@dataclass(frozen=True)
class SampleRequest:
    """Prompts to answer."""

    token_ids: numpy.ndarray
    """int32 [N]"""
    lengths: numpy.ndarray
    """int32 [S]"""
    seeds: numpy.ndarray
    """int64 [S]"""
    sampling: SamplingSettings
    vocab_size: int | None = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **options: Any) -> SampleRequest:
        return cls(*end_to_end(prompts), numpy.array(seeds, dtype=numpy.int64), **options)

    @classmethod
    def parse(cls, body: bytes | bytearray) -> SampleRequest:
        """Return the request in a body. Raises BadBody; values are not checked."""
        arrays, metadata = unpack(body)
        vector = (numpy.int32, 1)
        tokens, lengths, seeds = take(arrays, token_ids=vector, lengths=vector, seeds=(numpy.int64, 1))
        vocab_size = number(metadata, "vocab_size", int) if "vocab_size" in metadata else None
        return cls(tokens, lengths, seeds, parse_sampling(metadata.get("sampling", "")), vocab_size)

    def body(self) -> bytes:
        metadata = {"sampling": json.dumps(asdict(self.sampling)), **_limit(self.vocab_size)}
        return pack({name: [getattr(self, name)] for name in ("token_ids", "lengths", "seeds")}, metadata)

    def part(self, begin: int, end: int) -> SampleRequest:
        """Return the request of some of its prompts."""
        tokens = slice(int(self.lengths[:begin].sum()), int(self.lengths[:end].sum()))
        some = self.token_ids[tokens], self.lengths[begin:end], self.seeds[begin:end]
        return SampleRequest(*some, self.sampling, self.vocab_size)


def _limit(vocab_size: int | None) -> dict[str, str]:
    return {} if vocab_size is None else {"vocab_size": str(vocab_size)}


def end_to_end(sequences: Sequence[Sequence[int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return the tokens of all sequences, int32 [N], and the sequences' lengths, int32 [S]."""
    tokens = numpy.fromiter((token for ids in sequences for token in ids), dtype=numpy.int32)
    return tokens, numpy.array([len(ids) for ids in sequences], dtype=numpy.int32)


def split(tokens: numpy.ndarray, lengths: numpy.ndarray) -> list[list[int]]:
    """Return the sequences that `end_to_end` put together."""
    ids = tokens.tolist()
    return [ids[begin:end] for begin, end in pairwise(accumulate(lengths.tolist(), initial=0))]


def parse_sampling(text: str) -> SamplingSettings:
    """Return the settings in JSON. Raises BadBody for unknown names and values of another type."""
    try:
        content = json.loads(text)
        kinds = {field.name: str(field.type) for field in fields(SamplingSettings)}
        if unknown := content.keys() - kinds.keys():
            raise BadBody(f"sampling has unknown names: {', '.join(sorted(unknown)):.100}")
        return SamplingSettings(**{name: _value(name, kinds[name], value) for name, value in content.items()})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadBody(f"sampling is not a JSON object of SamplingSettings ({error!r:.100})") from error


def _value(name: str, kind: str, value: Any) -> Any:
    kinds: dict[str, Any] = {"<class 'int'>": int, "<class 'float'>": (int, float), "<class 'bool'>": bool}
    if kind.startswith("tuple"):
        element = str if "str" in kind else int
        if not isinstance(value, list) or any(type(one) is not element for one in value):
            raise BadBody(f"sampling.{name} is {value!r:.40}, must be a list of {element.__name__}")
        return tuple(value)
    allowed = kinds[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):
        raise BadBody(f"sampling.{name} is {value!r:.40}, must be {kind[8:-2]}")
    return value
