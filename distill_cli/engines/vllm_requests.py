"""Requests to `vllm serve` and what their answers have in common. No torch."""

from __future__ import annotations

import json
from typing import Any

from distill_cli.engines.wire import BadBody

COMPLETIONS = "/v1/completions"
JSON_TYPE = "application/json"
NEUTRAL = {
    **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
    **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
    "add_special_tokens": False,
    "skip_special_tokens": False,
}
"""Settings that change nothing: what a request leaves out, vLLM takes from the model's generation_config.json."""


def read_object(body: bytes | bytearray) -> dict[str, Any]:
    """Return a JSON object. Raises BadBody if it is something else."""
    try:
        content = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise BadBody(f"no JSON: {error!r:.80}") from error
    if not isinstance(content, dict):
        raise BadBody(f"a JSON {type(content).__name__}, must be an object")
    return content


def choices_of(body: bytes | bytearray, num_prompts: int) -> list[dict[str, Any]]:
    """Return the choice of each prompt of a completion, in their order. Raises BadBody if they are not that."""
    choices = read_object(body).get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadBody("no choices")
    indices = [choice.get("index") for choice in choices]
    if sorted(index for index in indices if isinstance(index, int)) != list(range(num_prompts)):
        raise BadBody(f"choices {indices!r:.80} for {num_prompts} prompts")
    return sorted(choices, key=lambda choice: choice["index"])
