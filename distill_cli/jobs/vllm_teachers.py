"""Ask `vllm serve` what it does not say of itself: largest k, mode of log-probabilities, tokenizer. No torch.

`vllm serve` has no route for the model's files, so they are looked for here, and by texts and ids it is checked that
the server has the same tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill_cli.config.schema import TeacherModel
from distill_cli.engines.replicas import Replicas
from distill_cli.engines.server_info import VllmInfo
from distill_cli.engines.vllm_requests import COMPLETIONS, JSON_TYPE, NEUTRAL, choices_of, read_object
from distill_cli.engines.wire import BadBody
from distill_cli.errors import ConfigError, DistillError, TeacherLost
from distill_cli.models import model_files
from distill_cli.models.model_files import ModelFiles

TEXTS = (
    "Which number is larger, 17 or 23? 1234567890 * 0.25 = ?",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # in square metres\n",
    "The quick brown fox doesn't jump over «lazy» dogs; naïve café, straße, 東京, 你好, привет, 🙂.",
)
"""Words, numbers, code and scripts whose tokens differ between tokenizers."""
MANY, MOST_SPECIAL = 256, 64
"""Ids, evenly spread over the vocabulary, and added tokens, that are compared."""
PROMPT, ANSWER_TOKENS = list(range(8, 16)), 4
"""Ids that any vocabulary has, and tokens that are sampled after them."""
TOO_MANY = 10**9
"""More log-probabilities than any server gives: it refuses, and says how many it gives."""
LIMIT = re.compile(r"max allowed: (\d+)")
MOST_ERROR = 0.5
"""Nats by which a token's log-probability differs between sampling and scoring, at most (`handshake.ROUNDED`)."""


def find_files(model: TeacherModel, info: VllmInfo, *, key: str) -> ModelFiles:
    """Return the files of a server's model: of the path that is given, else of the server's if it is a folder here.

    Raises:
        ConfigError: they are not found; begins with the key of the path.
    """
    path_key = f"{key}.path"
    if model.path is not None:
        return ModelFiles.find(model.path, revision=model.revision, key=path_key, needs_weights=False)
    if (Path(info.root) / "config.json").is_file():
        return ModelFiles.find(str(Path(info.root).resolve()), key=path_key, needs_weights=False)
    what = f"the server's model is {info.root}, and `vllm serve` has no files of it to give"
    raise ConfigError(f"{path_key}: {what}; set it to a folder or hub name with its config and tokenizer")


async def most_topk(servers: Replicas[Any], info: VllmInfo) -> int | None:
    """Return the largest k that the servers give (`--max-logprobs`); None if they do not say. Raises as `Replicas`."""
    try:
        await _complete(servers, PROMPT, prompt_logprobs=TOO_MANY, max_tokens=1, temperature=0.0)
    except (TeacherLost, ConfigError):
        raise
    except DistillError as error:
        found = LIMIT.search(str(error))
        return int(found[1]) if found else None
    return None


async def mode_problem(servers: Replicas[Any]) -> str | None:
    """Return why the servers' log-probabilities are not the model's own; None if they are. Raises as `Replicas`.

    The likeliest token is sampled with top_k=1: with processed log-probabilities its own is 0, and with raw ones it is
    that of its score. Logits are told by their sum: they are not normalised.
    """
    options: dict[str, Any] = {"top_k": 1, "temperature": 1.0, "seed": 0, "logprobs": 0, "ignore_eos": True}
    answer = await _complete(servers, PROMPT, max_tokens=ANSWER_TOKENS, return_token_ids=True, **options)
    try:
        ids, sampled = answer["token_ids"], answer["logprobs"]["token_logprobs"]
        scores = await _complete(servers, PROMPT + ids, prompt_logprobs=1, max_tokens=1, temperature=0.0)
        rows = scores["prompt_logprobs"][len(PROMPT) :]
        scored = [row[str(token)]["logprob"] for token, row in zip(ids, rows, strict=True)]
        difference = max(abs(one - other) for one, other in zip(sampled, scored, strict=True))
        is_positive = max(*sampled, *scored) > 1e-3
        is_flat = not any(sampled) and min(scored) < 0.0
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return f"its completions have no prompt_logprobs or token_ids as vLLM 0.25.1 to 0.33 give them ({error!r:.80})"
    if not is_positive and not is_flat and difference < MOST_ERROR:
        return None
    found = f"a sampled token has {sampled[0]:.4g}, and {scored[0]:.4g} as the prompt's"
    return f"its log-probabilities are not the model's own ({found}); start it with --logprobs-mode raw_logprobs"


async def tokenizer_problem(servers: Replicas[Any], folder: Path) -> str | None:
    """Return the first token that the servers' tokenizer and a folder's do not share; None if none is found.

    None too if the folder has no tokenizer.json. Raises as `Replicas.post`, also for servers without a tokenizer.
    """
    vocabulary = model_files.vocabulary(folder)
    if vocabulary is None:
        return None
    from tokenizers import Tokenizer

    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    try:
        return await _text_problem(servers, vocabulary) or await _ids_problem(servers, vocabulary, ours)
    except (TeacherLost, ConfigError):
        raise
    except (BadBody, DistillError) as error:
        return (
            f"its tokenizer cannot be compared with the student's ({error}); it must answer /tokenize and /detokenize"
        )


async def _text_problem(servers: Replicas[Any], vocabulary: dict[str, int]) -> str | None:
    """Compare the tokens of some texts; how a tokenizer cuts them is not compared, as only ids are sent."""
    for text in TEXTS:
        content = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        found = await _ask(servers, "/tokenize", content)
        ids, tokens = found.get("tokens"), found.get("token_strs")
        if not isinstance(ids, list) or not isinstance(tokens, list):
            raise BadBody(f"/tokenize answered {found!r:.80}")
        for number, token in zip(ids, tokens, strict=True):
            if vocabulary.get(token) != number:
                return _differs(f"{token!r} is {number} there, and {vocabulary.get(token, 'absent')} in the student's")
    return None


async def _ids_problem(servers: Replicas[Any], vocabulary: dict[str, int], ours: Any) -> str | None:
    """Compare the texts of many ids, special tokens among them."""

    def here(ids: list[int]) -> str:
        return _bare(ours.decode(ids, skip_special_tokens=False))

    async def there(ids: list[int]) -> str:
        return _bare((await _ask(servers, "/detokenize", {"tokens": ids})).get("prompt"))

    for ids in (spread(sorted(vocabulary.values())), sorted(ours.get_added_tokens_decoder())[:MOST_SPECIAL]):
        if here(ids) == await there(ids):
            continue
        for number in ids:  # one request each: it ends at the first that differs
            if (own := here([number])) != (other := await there([number])):
                return _differs(f"id {number} is {other!r} there, and {own!r} in the student's")
    return None


def spread(ids: Sequence[int]) -> list[int]:
    """Return MANY ids at equal distances, or all if there are fewer."""
    step = max(1, len(ids) // MANY)
    return list(ids[::step])


def _bare(text: Any) -> str:
    """Return a text without spaces, which some tokenizers clean up when they decode."""
    if not isinstance(text, str):
        raise BadBody(f"/detokenize answered {text!r:.40}")
    return "".join(text.split())


def _differs(what: str) -> str:
    return f"its tokenizer is not the student's: {what}; choose a pair with the same tokenizer"


async def _complete(servers: Replicas[Any], prompt: list[int], **options: Any) -> dict[str, Any]:
    """Return the choice of one completion. Raises as `Replicas.post`."""
    content = {**NEUTRAL, "model": (await servers.info()).id, "prompt": [prompt], **options}
    body = json.dumps(content).encode()

    def parse(answer: bytearray) -> dict[str, Any]:
        return choices_of(answer, 1)[0]

    return await servers.post(COMPLETIONS, body, tokens=len(prompt), parse=parse, content_type=JSON_TYPE)


async def _ask(servers: Replicas[Any], route: str, content: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object that a route answers. Raises as `Replicas.post`."""
    body = json.dumps({"model": (await servers.info()).id, **content}).encode()
    return await servers.post(route, body, tokens=1, parse=read_object, content_type=JSON_TYPE)
