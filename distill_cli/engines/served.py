"""A teacher behind a scoring server (`distill serve`), or behind several with the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy
import torch

from distill_cli.engines.http_teacher import HttpTeacher
from distill_cli.engines.server_info import DISTILL, ServerInfo, ServerKind
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import BadBody, HeadRequest, SampleRequest, ScoreRequest, take, unpack
from distill_cli.engines.wire_tensors import find_tensor, parse_head
from distill_cli.errors import ConfigError
from distill_cli.types import ModelHead, Sample, TeacherScores

REQUEST_TOKENS = 4096
HEAD_BYTES = 2**25
"""Size of a part of the head, which is read once."""


class ServedTeacher(HttpTeacher):
    """Scores sequences on servers of `distill serve`.

    For example:
        teacher = ServedTeacher(["http://127.0.0.1:8008"], topk=64, temperature=1.0)
        teacher.wait_ready()
        scores = teacher.score(sequences, response_starts=[len(prompt) for prompt in prompts])
    """

    kind: ClassVar[ServerKind[ServerInfo]] = DISTILL
    request_tokens, sample_tokens = REQUEST_TOKENS, 16 * REQUEST_TOKENS

    def info(self) -> ServerInfo:
        """Return what the servers say of themselves. Raises as `wait_ready`."""
        return cast(ServerInfo, super().info())

    def vocabulary(self) -> dict[str, int] | None:
        """Return {token: id} as `model_files.vocabulary`. Raises as `wait_ready`."""
        return self._now(self._replicas.get("/vocabulary"))

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        """Return the head from the servers, some rows at a time. Raises ConfigError if they cannot say."""
        info = self.info()
        begin, end = rows or (0, info.vocab_size)
        end, size = min(end, info.vocab_size), max(1, HEAD_BYTES // self._hidden_bytes())
        parts = [self._head_part(first, min(first + size, end)) for first in range(begin, end, size)]
        if not parts:
            return self._head_part(0, 1).part((0, 0))
        biases = [part.bias for part in parts if part.bias is not None]
        return replace(
            parts[0], weight=torch.cat([part.weight for part in parts]), bias=torch.cat(biases) if biases else None
        )

    def _head_part(self, begin: int, end: int) -> ModelHead:
        def parse(body: bytearray) -> ModelHead:
            head = parse_head(*unpack(body))
            if len(head.weight) != end - begin:
                raise BadBody(f"{len(head.weight)} rows of the head, {end - begin} were asked for")
            return head

        body = HeadRequest(begin, end).body()
        return self._now(self._replicas.post("/head", body, tokens=1, parse=parse))

    def _hidden_bytes(self) -> int:
        info = self.info()
        if not info.hidden_size:
            what = f"{info.name}: its server ({info.version}) returns no hidden states"
            raise ConfigError(f"loss.support: {what}; start it with this version, or set teacher")
        return info.hidden_size * info.hidden_bytes

    async def _score(self, sequences: list[list[int]], response_starts: list[int], hidden: bool) -> list[TeacherScores]:
        options = {
            "topk": 0 if hidden else self._topk,
            "temperature": self._temperature,
            "vocab_size": self._vocab_size,
        }
        request = ScoreRequest.of(sequences, response_starts, **options)

        def parse(body: bytearray) -> list[TeacherScores]:
            return parse_scores(body, request)

        return await self._replicas.post("/score", request.body(), tokens=len(request.token_ids), parse=parse)

    async def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingSettings
    ) -> list[Sample]:
        request = SampleRequest.of(prompts, seeds, sampling=sampling, vocab_size=self._vocab_size)

        def parse(body: bytearray) -> list[Sample]:
            return parse_samples(body, request)

        tokens = len(request.token_ids) + len(request.lengths) * request.sampling.max_new_tokens
        return await self._replicas.post("/sample", request.body(), tokens=tokens, parse=parse)


def parse_scores(body: bytearray, request: ScoreRequest) -> list[TeacherScores]:
    """Return the scores of each sequence. Raises BadBody if they are not of this request."""
    if request.topk == 0:
        hidden = find_tensor(unpack(body)[0], "hidden", num_dims=2)
        if hidden is None or len(hidden) != request.num_rows:
            raise BadBody(f"no hidden states of {request.num_rows} tokens")
        return [
            TeacherScores.of_hidden(part) for part in hidden.split((request.lengths - request.response_starts).tolist())
        ]
    matrix, vector = (numpy.float32, 2), (numpy.float32, 1)
    arrays = take(unpack(body)[0], topk_ids=(numpy.int32, 2), topk_logp=matrix, sampled_logp=vector)
    rows, topk = request.num_rows, request.topk
    if [array.shape for array in arrays] != [(rows, topk), (rows, topk), (rows,)]:
        shapes = ", ".join(str(list(array.shape)) for array in arrays)
        raise BadBody(f"shapes {shapes} for {rows} tokens and top-{topk}")
    size = request.vocab_size
    if arrays[0].size and (arrays[0].min() < 0 or (size is not None and arrays[0].max() >= size)):
        raise BadBody("token ids outside the vocabulary")
    lengths = (request.lengths - request.response_starts).tolist()
    parts = [torch.from_numpy(array).split(lengths) for array in arrays]
    return [TeacherScores.of_topk(*fields) for fields in zip(*parts, strict=True)]


def parse_samples(body: bytearray, request: SampleRequest) -> list[Sample]:
    """Return the answer to each prompt. Raises BadBody if they are not of this request."""
    arrays, _ = unpack(body)
    vector, has_logp = (numpy.int32, 1), request.sampling.logp
    expected: dict[str, Any] = {"token_ids": vector, "lengths": vector, "stopped": (numpy.uint8, 1)}
    tokens, lengths, stopped, *logp = take(arrays, **expected, **({"logp": (numpy.float32, 1)} if has_logp else {}))
    num, total = len(request.lengths), int(lengths.sum())
    most = request.sampling.max_new_tokens
    counts = len(lengths), len(stopped), len(tokens), *map(len, logp)
    if counts != (num, num, total, *[total] * has_logp) or lengths.min() < 0 or lengths.max() > most:
        raise BadBody(f"{len(lengths)} answers of {len(tokens)} tokens to {num} prompts")
    ends = lengths.cumsum().tolist()
    samples = []
    for index, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True)):
        own = slice(end - length, end)
        reason = "stop" if stopped[index] else "length"
        samples.append(Sample(tokens[own].tolist(), logp[0][own].tolist() if has_logp else None, reason))
    return samples
