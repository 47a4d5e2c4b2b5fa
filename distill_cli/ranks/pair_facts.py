"""What the two models of a config share: ids, and tokens that end an answer; of a replay, what was recorded of them."""

from __future__ import annotations

import sys
from pathlib import Path

from distill_cli.config.schema import Config
from distill_cli.data.recorded_run import Facts
from distill_cli.models.model_files import locate
from distill_cli.models.model_pair import EndTokens, Vocabularies


def folders(config: Config) -> tuple[Path, Path]:
    """The student's and the teacher's."""
    roles = {"student": config.model.student, "teacher": config.model.teacher}
    return tuple(locate(m.path, revision=m.revision, key=f"model.{role}.path") for role, m in roles.items())


def vocabularies(config: Config) -> Vocabularies:
    name = config.model.tokenizer
    return Vocabularies.of(*folders(config), tokenizer=locate(name, key="model.tokenizer") if name else None)


def shared_vocabulary(config: Config) -> int | None:
    """Ids from here on are neither sampled nor scored; None where student and teacher have the same."""
    if config.rollout.replay is not None:  # its teacher may be gone
        return Facts.of(config.rollout.replay).vocab_size
    return vocabularies(config).limit


def merged_eos_ids(config: Config) -> tuple[int, ...]:
    """The tokens that end an answer and are taken for one (`model.eos_map`)."""
    if config.rollout.replay is not None:
        return tuple(Facts.of(config.rollout.replay).merged_eos_ids)
    limit = vocabularies(config).limit or sys.maxsize
    return tuple(token for token in EndTokens.of(*folders(config)).merged_eos_ids(config) if token < limit)
