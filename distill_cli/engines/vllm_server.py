"""A teacher behind `vllm serve`, or behind several with the same model, by its completions and `prompt_logprobs`.

| what   | request                                              | answer                                             |
|--------|------------------------------------------------------|----------------------------------------------------|
| scores | POST /v1/completions: token ids of several sequences | `prompt_logprobs`: for each position after the     |
|        |                                                      | first, {id: {logprob, rank}} of the top-k and of   |
|        |                                                      | the position's own token                           |
| sample | POST /v1/completions: token ids of one prompt, seed  | `token_ids`, `finish_reason`, and the              |
|        |                                                      | log-probabilities of the tokens                    |

The fields are those that vLLM 0.25.1 and 0.32 share. Scores come for all positions of a sequence and in JSON, which is
why `distill serve` is faster. Log-probabilities survive JSON exactly: they are float32, printed as doubles.

Shape letters: R response tokens of one sequence, K the teacher's top-k.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch

from distill_cli.engines.engine import fold_seed
from distill_cli.engines.http_teacher import HttpTeacher
from distill_cli.engines.server_info import VLLM, ServerKind, VllmInfo
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.vllm_requests import COMPLETIONS, JSON_TYPE, NEUTRAL, choices_of
from distill_cli.engines.wire import BadBody
from distill_cli.errors import ConfigError, DistillError
from distill_cli.types import ModelHead, Sample, TeacherScores

REQUEST_TOKENS = 2048
SAMPLES_IN_FLIGHT = 64
"""Prompts that a server has at a time: each is a request of its own, as a request has one seed."""
CLAMPED = -9999.0
"""What vLLM prints for -inf, which JSON does not have."""


class VllmServerTeacher(HttpTeacher):
    """Scores sequences on servers of `vllm serve`, at temperature 1 and over the server's whole vocabulary.

    For example:
        teacher = VllmServerTeacher(["http://127.0.0.1:8000"], topk=64)  # vllm serve MODEL --max-logprobs 64
        teacher.wait_ready()
        scores = teacher.score(sequences, response_starts=[len(prompt) for prompt in prompts])
    """

    kind: ClassVar[ServerKind[VllmInfo]] = VLLM
    request_tokens, sample_tokens = REQUEST_TOKENS, 1
    default_probe_s = 120.0  # the thread that answers probes also writes the scores of all clients as JSON

    def __init__(self, addresses: Sequence[str], *, topk: int, temperature: float = 1.0, **options: Any) -> None:
        """Connect to nothing yet; see `HttpTeacher`. `vocab_size` is only checked: ids must be below it.

        Raises:
            ConfigError: an address is none, the token would travel in the clear, or the temperature is not 1.
        """
        if temperature != 1.0:
            fix = "set it to 1, or use `distill serve`"
            raise ConfigError(f"loss.temperature={temperature:g}: a {VLLM.shown} scores only at temperature 1; {fix}")
        super().__init__(addresses, topk=topk, **options)

    def info(self) -> VllmInfo:
        """Return what the servers say of their model. Raises as `wait_ready`."""
        return cast(VllmInfo, super().info())

    def head(self, rows: tuple[int, int] | None = None) -> ModelHead:
        raise ConfigError(f"loss.support: a {VLLM.shown} returns no hidden states; set teacher, or use `distill serve`")

    def _hidden_bytes(self) -> int:
        raise ConfigError(f"loss.support: a {VLLM.shown} returns no hidden states; set teacher, or use `distill serve`")

    async def _score(self, sequences: list[list[int]], response_starts: list[int], hidden: bool) -> list[TeacherScores]:
        content = {"prompt": sequences, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": self._topk}

        def parse(choices: list[dict[str, Any]]) -> list[TeacherScores]:
            rows = zip(choices, sequences, response_starts, strict=True)
            return [parse_scores(choice, ids, start, topk=self._topk) for choice, ids, start in rows]

        scores = await self._complete(content, tokens=sum(map(len, sequences)), parse=parse)
        if self._vocab_size is not None:
            self._check_ids(max(int(one.topk_ids.max()) for one in scores))
        return scores

    async def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: SamplingSettings
    ) -> list[Sample]:
        samples = []
        for prompt, seed in zip(prompts, seeds, strict=True):  # one, as `sample_tokens` is
            samples.append(await self._answer(prompt, seed, sampling))
        return samples

    async def _answer(self, prompt: list[int], seed: int, sampling: SamplingSettings) -> Sample:
        info: VllmInfo = await self._replicas.info()
        room = info.max_model_len - len(prompt)
        if room < 1:
            what = f"a prompt has {len(prompt)} tokens, must have fewer than {info.max_model_len}"
            raise DistillError(f"the teacher: {what}; start the server with a larger --max-model-len")
        asked = min(sampling.max_new_tokens, room)
        content: dict[str, Any] = {"prompt": [prompt], "max_tokens": asked, "seed": fold_seed(seed)}
        for name in ("temperature", "top_p", "top_k", "ignore_eos"):
            content[name] = getattr(sampling, name)
        content |= {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
        content |= {"return_token_ids": True, "logprobs": 0 if sampling.logp else None}

        def parse(choices: list[dict[str, Any]]) -> Sample:
            return parse_sample(choices[0], has_logp=sampling.logp, max_tokens=asked)

        tokens = len(prompt) + asked
        sample = await self._complete(content, tokens=tokens, parse=parse, in_flight=SAMPLES_IN_FLIGHT)
        if sample.finish_reason == "length" and len(sample.token_ids) < asked:
            what = f"ended an answer after {len(sample.token_ids)} of {asked} tokens"
            raise DistillError(f"the server {what}; start it with --generation-config vllm")
        self._check_ids(max(sample.token_ids, default=0))
        return sample

    async def _complete(
        self,
        content: dict[str, Any],
        *,
        tokens: int,
        parse: Callable[[list[dict[str, Any]]], Any],
        in_flight: int | None = None,
    ) -> Any:
        """Return what `parse` makes of the choices, one for each prompt in `content`. Raises as `Replicas.post`."""
        model, num_prompts = (await self._replicas.info()).id, len(content["prompt"])
        body = json.dumps({**NEUTRAL, "model": model, **content}).encode()

        def read(answer: bytearray) -> Any:
            return parse(choices_of(answer, num_prompts))

        options: dict[str, Any] = {"content_type": JSON_TYPE, "in_flight": in_flight}
        return await self._replicas.post(COMPLETIONS, body, tokens=tokens, parse=read, **options)

    def _check_ids(self, largest: int) -> None:
        if self._vocab_size is not None and largest >= self._vocab_size:
            what = (
                f"its server gives ids up to {largest}, and those below {self._vocab_size} are shared with the student"
            )
            raise DistillError(f"the teacher: {what}; use `distill serve`, which leaves the others out")


def parse_scores(choice: dict[str, Any], ids: list[int], start: int, *, topk: int) -> TeacherScores:
    """Return the scores of a sequence from position `start` on. Raises BadBody if they are not of this request."""
    positions = choice.get("prompt_logprobs")
    if not isinstance(positions, list) or len(positions) != len(ids):
        number = len(positions) if isinstance(positions, list) else "no"
        raise BadBody(f"{number} positions with log-probabilities for a sequence of {len(ids)} tokens")
    topk_ids, topk_logp, own_logp = list[list[int]](), list[list[float]](), list[float]()
    try:
        for token, position in zip(ids[start:], positions[start:], strict=True):
            found = {int(name): (entry["rank"], entry["logprob"]) for name, entry in position.items()}
            own_logp.append(found[token][1])
            if len(found) == topk + 1:  # its own token is not among the top-k
                del found[token]
            best = sorted(found, key=found.__getitem__)
            topk_ids.append(best)
            topk_logp.append([found[token][1] for token in best])
        logp_RK = torch.tensor(topk_logp, dtype=torch.float32).reshape(-1, topk)
        ids_RK = torch.tensor(topk_ids, dtype=torch.int32).reshape(-1, topk)
        own_R = torch.tensor(own_logp, dtype=torch.float32)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadBody(f"prompt_logprobs are not those of top-{topk} ({error!r:.80})") from error
    if len(ids_RK) != len(own_R):
        raise BadBody(f"prompt_logprobs have other than {topk} tokens")
    return TeacherScores.of_topk(ids_RK, _unclamped(logp_RK), _unclamped(own_R))


def _unclamped(logp: torch.Tensor) -> torch.Tensor:
    return logp.masked_fill_(logp == CLAMPED, -torch.inf)


def parse_sample(choice: dict[str, Any], *, has_logp: bool, max_tokens: int) -> Sample:
    """Return an answer. Raises BadBody if it is not one to this request."""
    ids, why = choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(ids, list) or len(ids) > max_tokens or why not in ("stop", "length"):
        raise BadBody(f"an answer that ended with {why!r:.40}, and its token ids are {ids!r:.40}")
    logp = (choice.get("logprobs") or {}).get("token_logprobs") if has_logp else None
    if has_logp and (not isinstance(logp, list) or len(logp) != len(ids)):
        raise BadBody(f"{len(ids)} tokens whose log-probabilities are {logp!r:.40}")
    return Sample(ids, logp, why)
