"""Hold the heads of teachers whose scores are hidden states, and the tokens of those with a tokenizer of their own."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

import torch

from distill_cli.config.derived import needs_hidden
from distill_cli.config.teachers import teacher_names
from distill_cli.data.recorded_run import Recording
from distill_cli.engines.base import Teacher
from distill_cli.engines.guarded import GuardedTeacher
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.groups import TokenGroups
from distill_cli.ranks.build_source import Rank
from distill_cli.resolved import ResolvedRun
from distill_cli.rollout.score_files import read_head, read_tokens, write_head
from distill_cli.student.model import Student
from distill_cli.student.teacher_head import TeacherHeads
from distill_cli.tokens.translation import Translation
from distill_cli.types import ModelHead

OwnTokens = dict[int, tuple[torch.Tensor, TokenGroups]]
"""By index, of teachers with a tokenizer of their own: the student's first token of each of theirs, and the groups of
the student's."""


def hold_teachers(rank: Rank, student: Student, translations: Mapping[int, Translation]) -> OwnTokens:
    """Give the student what its teachers' scores are compared with: groups of tokens, heads. Return the tokens. A
    collective."""
    tokens = own_tokens(rank.resolved, translations)
    student.groups = {index: groups.to(rank.parallel.device) for index, (_, groups) in tokens.items()}
    if uses_hidden(rank.resolved):
        student.heads = build_heads(rank, student, {index: firsts for index, (firsts, _) in tokens.items()})
    return tokens


def own_tokens(resolved: ResolvedRun, translations: Mapping[int, Translation]) -> OwnTokens:
    """Return the tokens of the run's teachers: in a replay, as they were recorded."""
    if (recorded := resolved.recorded_run) is None:
        return {index: (one.firsts, one.groups) for index, one in translations.items()}
    folder = Recording.of(str(recorded)).folder
    found = {index: read_tokens(folder, index) for index in range(len(teacher_names(resolved.config)))}
    return {index: one for index, one in found.items() if one is not None}


def build_heads(
    rank: Rank, student: Student, firsts: Mapping[int, torch.Tensor] = MappingProxyType({})
) -> TeacherHeads:
    """Build the holder of the teachers' heads: of a replay's as they were recorded, else still empty. A collective.

    Args:
        firsts: see `TeacherHeads`.
    """
    vocabulary, recorded = rank.resolved.vocabulary, rank.resolved.recorded_run
    shard = student.lm.get_output_embeddings().weight.shape[0] // rank.parallel.tensor.size()
    heads = TeacherHeads(rank.parallel, vocabulary.size if vocabulary.limit is None else vocabulary.limit, shard)
    heads.firsts |= {index: one.to(rank.parallel.device) for index, one in firsts.items()}
    if recorded is not None:
        folder = Recording.of(str(recorded)).folder
        for index in range(len(teacher_names(rank.resolved.config))):
            heads.read(index, partial(read_head, folder, index))
    return heads


def uses_hidden(resolved: ResolvedRun) -> bool:
    """Whether the teachers' scores are hidden states: those that are recorded, in a replay."""
    recorded = resolved.recorded_run
    return needs_hidden(resolved.config) if recorded is None else Recording.of(str(recorded)).facts.hidden


def record_heads(run: RunDir, heads: TeacherHeads) -> None:
    """Write each teacher's head into the run's scores, by the first ranks of each shard of it. A collective."""
    for index, head in heads.gather().items():
        if heads.parallel.data_rank == heads.parallel.context.get_local_rank() == 0:
            bias, transform = None if head.bias_V is None else head.bias_V.cpu(), head.transform
            rows = ModelHead(head.weight_VH.cpu(), bias, transform.scale, transform.soft_cap)
            write_head(run.scores, index, heads.rows(index)[0], rows)


def read_moving_head(heads: TeacherHeads, index: int, teacher: Teacher) -> None:
    """Take the head of a teacher whose weights move, as it scored with it. A collective."""
    assert isinstance(teacher, GuardedTeacher)
    if teacher.is_moving:
        heads.read(index, teacher.head)
