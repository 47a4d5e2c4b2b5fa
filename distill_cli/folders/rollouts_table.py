"""Rollouts as parquet files, for inspection."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from distill_cli.folders.atomic_dir import replacing
from distill_cli.types import Rollout, TokenViews

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RolloutsFolder:
    """Where a run writes rollouts for inspection."""

    path: Path
    decode: Callable[[list[int]], str]
    token_text: Callable[[int], str]
    """Return the text of one token, special tokens included."""
    is_written: bool = True
    """False on all ranks but the main one."""

    def write(self, name: str, rollouts: Sequence[Rollout], *, views: Sequence[TokenViews] = ()) -> Path:
        """Write one row per sequence; return the file's path. A full disk is a warning.

        A row holds the prompt's index in the data, prompt and response as text and token ids, the finish reason and
        the reward; `sampled_logp` is the sampler's log-probability of each response token, null if unknown.

        Args:
            views: one per rollout, written token by token with the texts of the likeliest tokens, or none.
        """
        file = self.path / name
        if not self.is_written:
            return file
        columns = {
            "prompt_index": [rollout.prompt.index for rollout in rollouts],
            "prompt": [self.decode(rollout.prompt.token_ids) for rollout in rollouts],
            "response": [self.decode(rollout.sample.token_ids) for rollout in rollouts],
            "prompt_ids": [rollout.prompt.token_ids for rollout in rollouts],
            "response_ids": [rollout.sample.token_ids for rollout in rollouts],
            "sampled_logp": [rollout.sample.logp for rollout in rollouts],
            "finish_reason": [rollout.sample.finish_reason for rollout in rollouts],
            "reward": [rollout.reward for rollout in rollouts],
        }
        if views:
            columns |= _view_columns(rollouts, views, text=cache(self.token_text))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                pyarrow.parquet.write_table(pyarrow.table(columns), temporary, compression="zstd")
        except OSError as error:
            log.warning("cannot write %s: %s", file, error.strerror or error)
        return file


def _view_columns(
    rollouts: Sequence[Rollout], views: Sequence[TokenViews], *, text: Callable[[int], str]
) -> dict[str, list[Any]]:
    columns = {field.name: [getattr(view, field.name) for view in views] for field in fields(TokenViews)}
    columns["tokens"] = [[text(token) for token in rollout.sample.token_ids] for rollout in rollouts]
    for role in ("student", "teacher"):
        top_ids = columns[f"{role}_top_ids"]
        columns[f"{role}_top_tokens"] = [[[text(i) for i in ids] for ids in response] for response in top_ids]
    return columns
