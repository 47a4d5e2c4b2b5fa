"""Rollouts as a parquet file, for a look at them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from distill_cli.types import Rollout


def write_rollouts(path: Path, rollouts: Sequence[Rollout], *, decode: Callable[[list[int]], str]) -> None:
    """One row a sequence: the prompt's place in the data, both texts and token ids, how it ended, its reward.

    `sampled_logp` is the student's log-probability of each response token, by the sampler.
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
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
