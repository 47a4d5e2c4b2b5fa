"""A teacher behind a scoring server (`distill serve`), or behind several with the same model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy
import torch

from distill_cli.engines.http_teacher import HttpTeacher
from distill_cli.engines.server_info import DISTILL, ServerInfo, ServerKind
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import BadBody, SampleRequest, ScoreRequest, take, unpack
from distill_cli.types import Sample, TeacherScores

REQUEST_TOKENS = 4096


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

    async def _score(self, sequences: list[list[int]], response_starts: list[int]) -> list[TeacherScores]:
        options = {"topk": self._topk, "temperature": self._temperature, "vocab_size": self._vocab_size}
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
    return [TeacherScores(*fields) for fields in zip(*parts, strict=True)]


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
