"""What a client of vLLM's server makes of answers, right and wrong ones, and of what the server says of itself."""

import asyncio
import json
from typing import Any

import pytest
import torch

from distill_cli.config.schema import TeacherModel
from distill_cli.engines.recognise import recognise
from distill_cli.engines.server_info import VLLM, VllmInfo
from distill_cli.engines.vllm_requests import choices_of
from distill_cli.engines.vllm_server import VllmServerTeacher, parse_sample, parse_scores
from distill_cli.engines.wire import TOKEN, BadBody
from distill_cli.errors import ConfigError, DistillError
from distill_cli.jobs import vllm_teachers

from .test_served import Double, answer, html, status

IDS = [7, 3, 9]
CARD = {"id": "m", "root": "org/m", "owned_by": "vllm", "parent": None, "max_model_len": 64}


def row(*entries: tuple[int, float, int]) -> dict[str, dict[str, Any]]:
    return {str(token): {"logprob": logp, "rank": rank, "decoded_token": "x"} for token, logp, rank in entries}


CHOICE = {
    "index": 0,
    "prompt_logprobs": [
        None,
        row((3, -1.5, 2), (5, -0.5, 1)),  # its own token is the second of the top-2
        row((9, -9999.0, 30), (4, -0.25, 1), (2, -2.0, 2)),  # outside
    ],
}


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VLLM.token_names:
        monkeypatch.delenv(name, raising=False)


def test_scores_are_read() -> None:
    scores = parse_scores(CHOICE, IDS, 1, topk=2)
    assert scores.topk_ids.tolist() == [[5, 3], [4, 2]]
    assert scores.topk_logp.tolist() == [[-0.5, -1.5], [-0.25, -2.0]]
    assert scores.sampled_logp.tolist() == [-1.5, -torch.inf]
    assert (scores.topk_ids.dtype, scores.topk_logp.dtype) == (torch.int32, torch.float32)
    (last,) = parse_scores(CHOICE, IDS, 2, topk=2).topk_ids.tolist()
    assert last == [4, 2]


def test_ties_do_not_add_tokens() -> None:
    """A token outside the top-k may have the same rank as the last inside, in versions that count only larger ones."""
    tied = {"prompt_logprobs": [None, row((3, -1.0, 2), (5, -0.5, 1), (6, -1.0, 2))]}
    scores = parse_scores(tied, [7, 3], 1, topk=2)
    assert (scores.topk_ids.tolist(), scores.sampled_logp.tolist()) == ([[5, 6]], [-1.0])


@pytest.mark.parametrize(
    "positions",
    [
        None,
        [None, row((3, -1.5, 2), (5, -0.5, 1))],  # one is left out, as by a cached prefix
        [None, row((5, -0.5, 1), (4, -0.6, 2)), row((9, -1.0, 1), (4, -2.0, 2))],  # without its own token
        [None, row((3, -0.5, 1)), row((9, -1.0, 1), (4, -2.0, 2))],
        [None, None, None],
        [None, {"3": -1.0, "4": -2.0}, {"9": -1.0, "4": -2.0}],
        [None, {"three": {"logprob": 0.0, "rank": 1}}, {}],
    ],
)
def test_other_scores_are_refused(positions: Any) -> None:
    with pytest.raises(BadBody):
        parse_scores({"prompt_logprobs": positions}, IDS, 1, topk=2)


@pytest.mark.parametrize(
    "change",
    [
        {"token_ids": None},
        {"token_ids": [1, 2, 3]},
        {"finish_reason": "abort"},
        {"logprobs": None},
        {"logprobs": {"token_logprobs": [-1.0]}},
    ],
)
def test_other_answers_are_refused(change: dict[str, Any]) -> None:
    choice = {"token_ids": [4, 5], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    sample = parse_sample(choice, has_logp=True, max_tokens=2)
    assert (sample.token_ids, sample.logp, sample.finish_reason) == ([4, 5], [-1.0, -2.0], "stop")
    with pytest.raises(BadBody):
        parse_sample(choice | change, has_logp=True, max_tokens=2)


def test_choices_are_in_order() -> None:
    body = json.dumps({"choices": [{"index": 1, "text": "b"}, {"index": 0, "text": "a"}]}).encode()
    assert [choice["text"] for choice in choices_of(body, 2)] == ["a", "b"]
    for other in (
        body[:-2],
        b"[]",
        b"{}",
        b'{"choices": [3]}',
        b'{"choices": [{"index": 0}]}',
        b'{"choices": [{}, {}]}',
    ):
        with pytest.raises(BadBody):
            choices_of(other, 2)


def test_the_first_model_is_no_adapter() -> None:
    adapter = CARD | {"id": "lora", "parent": "m"}
    info = VllmInfo.parse({"object": "list", "data": [adapter, CARD]})
    assert (info.id, info.path, info.max_model_len) == ("m", "org/m", 64)
    assert info.name == "org/m (as m)"
    for other in (
        {},
        {"data": []},
        {"data": [CARD | {"owned_by": "another"}]},
        {"data": [CARD | {"max_model_len": None}]},
    ):
        with pytest.raises(ValueError, match="server of vLLM"):
            VllmInfo.parse(other)


def vllm_double(handler: Any, _: bytes) -> None:
    if handler.path == "/v1/models":
        answer(handler, json.dumps({"object": "list", "data": [CARD]}).encode(), kind="application/json")
    else:
        answer(handler, b'{"detail": "Not Found"}', status=404, kind="application/json")


def test_kinds_are_recognised() -> None:
    doubles = Double(), Double(), Double(), Double()
    doubles[1].always, doubles[2].always, doubles[3].always = vllm_double, html, status(401)

    def kind_of(double: Double) -> str:
        return asyncio.run(recognise([double.address + "/"], certificate=None, patience_s=5.0)).name

    assert [kind_of(double) for double in doubles[:2]] == ["distill", "vllm"]
    with pytest.raises(ConfigError, match="It works!.*give the address of `distill serve` or `vllm serve`"):
        kind_of(doubles[2])
    with pytest.raises(ConfigError, match=f"refuses the token .*set {TOKEN}"):
        kind_of(doubles[3])
    for double in doubles:
        double.close()


def test_keys_do_not_travel_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with pytest.raises(ConfigError, match=r"the token of DISTILL_SERVER_TOKEN or VLLM_API_KEY .*--ssl-certfile"):
        VllmServerTeacher(["http://10.0.0.1:8000"], topk=4)
    monkeypatch.setenv(TOKEN, "first")
    assert VLLM.token == "first"


class Servers:
    """Answers completions as a server in some mode of log-probabilities would."""

    def __init__(self, *, sampled: list[float], scored: list[float], limit: str = "") -> None:
        self.sampled, self.scored, self.limit = sampled, scored, limit

    async def info(self) -> VllmInfo:
        return VllmInfo("m", "m", 64)

    async def post(self, route: str, body: bytes, *, parse: Any, **_: Any) -> Any:
        request = json.loads(body)
        if self.limit:
            raise DistillError(self.limit)
        rows = [row((3, logp, 1)) for logp in self.scored]
        choice = {
            "index": 0,
            "token_ids": [3] * len(self.sampled),
            "logprobs": {"token_logprobs": self.sampled},
            "prompt_logprobs": [None, *[{}] * (len(request["prompt"][0]) - len(rows) - 1), *rows],
        }
        return parse(json.dumps({"choices": [choice]}).encode())


@pytest.mark.parametrize(
    ("sampled", "scored", "is_right"),
    [
        ([-0.5, -1.5], [-0.51, -1.5], True),
        ([0.0, -0.5], [0.0, -0.5], True),
        ([0.0, 0.0], [-0.1, -0.2], False),  # processed_logprobs, of a sure model
        ([0.0, 0.0], [-2.0, -1.5], False),  # processed_logprobs
        ([11.0, 12.5], [11.0, 12.5], False),  # raw_logits
        ([11.0, 12.5], [-0.5, -0.1], False),  # raw_logits, before prompts had them too
    ],
)
def test_modes_are_told_apart(sampled: list[float], scored: list[float], is_right: bool) -> None:
    problem = asyncio.run(vllm_teachers.mode_problem(Servers(sampled=sampled, scored=scored)))  # type: ignore[arg-type]
    assert (problem is None) == is_right
    assert is_right or "--logprobs-mode raw_logprobs" in str(problem)


@pytest.mark.parametrize(
    ("sentence", "limit"),
    [
        ("Requested prompt logprobs of 1000000000, which is greater than max allowed: 20 (parameter=x)", 20),
        ("requested prompt_logprobs of 1000000000, which is greater than max allowed: 512", 512),
        ("no", None),
    ],
)
def test_the_largest_k_is_read(sentence: str, limit: int | None) -> None:
    servers: Any = Servers(sampled=[], scored=[], limit=sentence)
    assert asyncio.run(vllm_teachers.most_topk(servers, VllmInfo("m", "m", 64))) == limit


def test_files_need_a_path() -> None:
    """A server's root is looked for only here, as it may be another machine's folder."""
    with pytest.raises(ConfigError, match=r"model.teacher.path: the server's model is /nowhere, .*set it to a folder"):
        vllm_teachers.find_files(TeacherModel(), VllmInfo("m", "/nowhere", 64), key="model.teacher")
