"""Rollouts as a parquet file, for a look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from distill_cli.folders.atomic_dir import replacing
from distill_cli.types import Rollout, TokenViews


def write_rollouts(
    path: Path,
    rollouts: Sequence[Rollout],
    *,
    decode: Callable[[list[int]], str],
    token_text: Callable[[int], str] | None = None,
) -> None:
    """One row a sequence: the prompt's place in the data, both texts and token ids, how it ended, its reward.

    `sampled_logp` is the student's log-probability of each response token, by the sampler. Rollouts with `views` have
    these too, token by token, with the likeliest tokens' texts beside their ids; `token_text` is needed for them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "prompt_index": [rollout.prompt.index for rollout in rollouts],
        "prompt": [decode(rollout.prompt.token_ids) for rollout in rollouts],
        "response": [decode(rollout.sample.token_ids) for rollout in rollouts],
        "prompt_ids": [rollout.prompt.token_ids for rollout in rollouts],
        "response_ids": [rollout.sample.token_ids for rollout in rollouts],
        "sampled_logp": [rollout.sample.logp for rollout in rollouts],
        "finish_reason": [rollout.sample.finish_reason for rollout in rollouts],
        "reward": [rollout.reward for rollout in rollouts],
    }
    if token_text is not None:
        columns |= _view_columns(rollouts, text=cache(token_text))
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")


def _view_columns(rollouts: Sequence[Rollout], *, text: Callable[[int], str]) -> dict[str, list[Any]]:
    views: list[TokenViews] = [rollout.views for rollout in rollouts]
    scalars = ("loss", "kl_forward", "kl_reverse", "entropy", "student_logp", "teacher_logp")
    ranked = ("student_top_ids", "student_top_logp", "teacher_top_ids", "teacher_top_logp")
    columns = {name: [getattr(view, name) for view in views] for name in (*scalars, *ranked)}
    columns["tokens"] = [[text(token) for token in rollout.sample.token_ids] for rollout in rollouts]
    for role in ("student", "teacher"):
        of_role = columns[f"{role}_top_ids"]
        columns[f"{role}_top_tokens"] = [[[text(i) for i in ids] for ids in response] for response in of_role]
    return columns
