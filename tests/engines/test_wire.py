"""Bodies are safetensors files, whatever is damaged in one is a sentence, and nothing else is raised."""

import json
from contextlib import suppress
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as library

from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import Arrays, BadBody, HeadRequest, SampleRequest, ScoreRequest, pack, split, unpack
from distill_cli.engines.wire_tensors import head_arrays, parse_head
from distill_cli.types import ModelHead

SEQUENCES, STARTS = [[5, 6, 7], [8], [9, 10]], [1, 1, 2]
REQUEST = ScoreRequest.of(SEQUENCES, STARTS, topk=4, temperature=0.1, vocab_size=11)
SAMPLING = SamplingSettings(max_new_tokens=3, temperature=0.7, stop=("a", "ü"), stop_token_ids=(3,), ignore_eos=True)


def fields(request: ScoreRequest | SampleRequest) -> list[object]:
    return [value.tolist() if isinstance(value, numpy.ndarray) else value for value in vars(request).values()]


def test_requests_survive_the_wire() -> None:
    assert fields(ScoreRequest.parse(REQUEST.body())) == fields(REQUEST)
    whole = replace(REQUEST, vocab_size=None)
    assert fields(ScoreRequest.parse(whole.body())) == fields(whole)
    sampled = SampleRequest.of(SEQUENCES, [1, -5, 2**62], sampling=SAMPLING)
    assert fields(SampleRequest.parse(sampled.body())) == fields(sampled)
    assert split(REQUEST.token_ids, REQUEST.lengths) == SEQUENCES
    assert REQUEST.num_rows == 2


def test_parts_hold_their_sequences() -> None:
    part = REQUEST.part(1, 3)
    assert split(part.token_ids, part.lengths) == SEQUENCES[1:]
    assert part.response_starts.tolist() == [1, 2]
    sampled = SampleRequest.of(SEQUENCES, [1, 2, 3], sampling=SAMPLING).part(0, 2)
    assert (split(sampled.token_ids, sampled.lengths), sampled.seeds.tolist()) == (SEQUENCES[:2], [1, 2])


def test_bodies_are_safetensors_files() -> None:
    matrix = numpy.arange(6, dtype=numpy.float32).reshape(3, 2)
    body = pack({"m": [matrix[:1], matrix[1:], matrix[:0]], "empty": [numpy.zeros((0, 4), numpy.int32)]}, {"a": "1"})
    read = library.load(body)
    numpy.testing.assert_array_equal(read["m"], matrix)
    assert read["empty"].shape == (0, 4)
    arrays, metadata = unpack(library.save({"m": matrix}, {"b": "2"}))
    numpy.testing.assert_array_equal(arrays["m"], matrix)
    assert metadata == {"b": "2"}


def test_packing_takes_slices_as_they_are() -> None:
    columns = numpy.arange(12, dtype=numpy.int32).reshape(3, 4)[:, ::2]
    numpy.testing.assert_array_equal(unpack(pack({"c": [columns]}))[0]["c"], columns)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "I32", "shape": [1], "data_offsets": [0, 4], **changes}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01",
        b"\xff" * 64,
        with_header(b""),
        with_header(b"not JSON"),
        with_header(b"[" * 30000),
        with_header([]),
        with_header({"a": 3}),
        with_header({"a": {}}),
        with_header({"a": entry()}),
        with_header({"a": entry()}, b"12345"),
        with_header({"a": entry(dtype="F16")}, b"1234"),
        with_header({"a": entry(shape=[2])}, b"1234"),
        with_header({"a": entry(shape=[-1])}, b"1234"),
        with_header({"a": entry(shape=[True])}, b"1234"),
        with_header({"a": entry(shape=[2**40, 2**40])}, b"1234"),
        with_header({"a": entry(data_offsets=[-4, 0])}, b"1234"),
        with_header({"a": entry(), "b": entry()}, b"1234"),
        with_header({"a": entry(), "__metadata__": {"k": 3}}, b"1234"),
        with_header({"a": entry(), "__metadata__": 3}, b"1234"),
        REQUEST.body()[:-1],
        REQUEST.body() + b"0",
    ],
)
def test_damaged_bodies_are_refused(body: bytes) -> None:
    with pytest.raises(BadBody):
        unpack(body)


@given(st.integers(0, len(REQUEST.body()) - 1), st.integers(0, 255))
def test_no_byte_breaks_the_parser(place: int, value: int) -> None:
    body = bytearray(REQUEST.body())
    body[place] = value
    with suppress(BadBody):
        ScoreRequest.parse(body)


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"lengths": None}, {}, "the tensors are response_starts, token_ids, must be"),
        ({"more": numpy.zeros(1, numpy.int32)}, {}, "the tensors are"),
        ({"lengths": numpy.zeros(1, numpy.int64)}, {}, "lengths is int64 of shape \\[1\\], must be int32"),
        ({"token_ids": numpy.zeros((1, 1), numpy.int32)}, {}, "must be int32 with 1 dimension$"),
        ({}, {"topk": None}, "lacks topk"),
        ({}, {"topk": "1.5"}, "topk is '1.5', must be a number"),
        ({}, {"temperature": "warm"}, "temperature is 'warm'"),
        ({}, {"vocab_size": ""}, "vocab_size is ''"),
    ],
)
def test_other_tensors_are_refused(arrays: dict, metadata: dict, message: str) -> None:
    whole = {name: numpy.ones(1, numpy.int32) for name in ("token_ids", "lengths", "response_starts")} | arrays
    texts = {"topk": "4", "temperature": "1.0"} | metadata
    kept = {name: [array] for name, array in whole.items() if array is not None}
    body = pack(kept, {name: text for name, text in texts.items() if text is not None})
    with pytest.raises(BadBody, match=message):
        ScoreRequest.parse(body)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("{}", "not a JSON object"),  # max_new_tokens has no default
        ('{"max_new_tokens": 1, "zz": 2}', "unknown names: zz"),
        ('{"max_new_tokens": "many"}', "sampling.max_new_tokens is 'many', must be int"),
        ('{"max_new_tokens": true}', "sampling.max_new_tokens is True"),
        ('{"max_new_tokens": 1, "logp": 1}', "sampling.logp is 1, must be bool"),
        ('{"max_new_tokens": 1, "stop": "a"}', "sampling.stop is 'a', must be a list of str"),
        ('{"max_new_tokens": 1, "stop_token_ids": ["a"]}', "must be a list of int"),
    ],
)
def test_other_sampling_is_refused(sampling: str, message: str) -> None:
    one = numpy.ones(1, numpy.int32)
    body = pack({"token_ids": [one], "lengths": [one], "seeds": [one.astype(numpy.int64)]}, {"sampling": sampling})
    with pytest.raises(BadBody, match=message):
        SampleRequest.parse(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_any_type_travel(dtype: torch.dtype) -> None:
    head = ModelHead(torch.randn(5, 3).to(dtype), torch.randn(5).to(dtype), scale=0.3, soft_cap=30.0)
    arrays, metadata = head_arrays(head)
    found = parse_head(*unpack(bytearray(pack({name: [array] for name, array in arrays.items()}, metadata))))
    assert (found.weight.dtype, found.scale, found.soft_cap) == (dtype, 0.3, 30.0)
    assert found.weight.equal(head.weight)
    assert found.bias.equal(head.bias)


@pytest.mark.parametrize(
    ("arrays", "metadata"),
    [
        ({}, {"scale": "1.0", "soft_cap": "0.0"}),
        ({"weight.float32": numpy.zeros((2, 3), numpy.float32)}, {"scale": "1.0"}),
        ({"weight.float32": numpy.zeros((2, 3), numpy.float32)}, {"scale": "x", "soft_cap": "0.0"}),
        ({"weight.bfloat16": numpy.zeros((2, 3), numpy.float32)}, {"scale": "1.0", "soft_cap": "0.0"}),
        ({"weight.float32": numpy.zeros(3, numpy.float32)}, {"scale": "1.0", "soft_cap": "0.0"}),
        (
            {"weight.float32": numpy.zeros((2, 3), numpy.float32), "bias.float32": numpy.zeros(3, numpy.float32)},
            {"scale": "1.0", "soft_cap": "0.0"},
        ),
    ],
)
def test_damaged_heads_are_refused(arrays: Arrays, metadata: dict[str, str]) -> None:
    with pytest.raises(BadBody):
        parse_head(arrays, metadata)


@pytest.mark.parametrize("rows", [[1], [3, 2], [-1, 2], [0, 0]])
def test_rows_of_a_head_are_checked(rows: list[int]) -> None:
    with pytest.raises(BadBody, match="rows is"):
        HeadRequest.parse(pack({"rows": [numpy.array(rows, dtype=numpy.int64)]}))
