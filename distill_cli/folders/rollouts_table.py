"""Rollouts as parquet files, to look at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """Where a run leaves rollouts to look at."""

    path: Path
    decode: Callable[[list[int]], str]
    token_text: Callable[[int], str]
    """Text of one token, special ones too."""
    is_written: bool = True
    """False on all ranks but the main one."""

    def write(self, name: str, rollouts: Sequence[Rollout], *, views: Sequence[TokenViews] = ()) -> Path:
        """Write one row a sequence and return the file's path; a full disk is a warning.

        A row has the prompt's place in the data, both texts and token ids, how it ended and its reward; `sampled_logp`
        is the student's log-probability of each response token, by the sampler, null if unknown.

        Args:
            views: one for each rollout, written token by token with the likeliest tokens' texts, or none.
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
            log.warning("%s is not written: %s", file, error.strerror or error)
        return file


def _view_columns(
    rollouts: Sequence[Rollout], views: Sequence[TokenViews], *, text: Callable[[int], str]
) -> dict[str, list[Any]]:
    scalars = ("loss", "kl_forward", "kl_reverse", "entropy", "student_logp", "teacher_logp")
    ranked = ("student_top_ids", "student_top_logp", "teacher_top_ids", "teacher_top_logp")
    columns = {name: [getattr(view, name) for view in views] for name in (*scalars, *ranked)}
    columns["tokens"] = [[text(token) for token in rollout.sample.token_ids] for rollout in rollouts]
    for role in ("student", "teacher"):
        of_role = columns[f"{role}_top_ids"]
        columns[f"{role}_top_tokens"] = [[[text(i) for i in ids] for ids in response] for response in of_role]
    return columns
