"""A teacher with other tokens over two gloo ranks, each with a part of both vocabularies, gives what one gives."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.head import Head
from distill_cli.losses.linear_divergence import HeadOutput, linear_divergence
from distill_cli.losses.own_logits import OwnHead
from distill_cli.losses.teacher_chunk import TeacherHidden, TopK
from tests.losses.reference import HeadLoss
from tests.losses.test_own_tokens import Pair
from tests.tokens.test_student_scores import PAIRS
from tests.tokens.vocabularies import byte_level, map_of

RANKS = 2
GAP = [("b", "b"), ("a", "bb")], [("b", "a"), ("ba", "b"), ("a", "a")]
KINDS = {"both": PAIRS["both"], "with a gap": GAP}


def run(
    pair: Pair, teacher: TopK | TeacherHidden, kl_type: str, rank: int | None
) -> tuple[HeadOutput, list[torch.Tensor]]:
    """The head on the whole vocabulary, or on a rank's shard of it; and the gradients of the whole."""
    hidden, weight = (one.detach().clone() for one in pair.student)
    weight = torch.cat([weight, weight[: -len(weight) % RANKS] - 9])  # of equal shards
    teacher = replace(teacher)
    group = None if rank is None else dist.group.WORLD
    if rank is not None:
        weight = weight.chunk(RANKS)[rank].clone()
        if isinstance(teacher, TeacherHidden):
            assert teacher.own is not None
            size = -(-pair.tokens.teacher_ids // RANKS)
            rows = slice(rank * size, (rank + 1) * size)
            bias = None if teacher.head.bias_V is None else teacher.head.bias_V[rows]
            own = OwnHead(teacher.own.head.firsts_v[rows], size)
            head = Head(teacher.head.weight_VH[rows], bias, teacher.head.transform)
            teacher = replace(teacher, head=head, own=replace(teacher.own, head=own))
    if isinstance(teacher, TeacherHidden):
        teacher = replace(teacher, vocab_size=len(weight) * (1 if rank is None else RANKS))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    output = linear_divergence(
        leaves[0],
        Head(leaves[1]),
        teacher,
        HeadLoss(DistillLoss(kl_type=kl_type), torch.ones(len(hidden), dtype=torch.float64)),
        sampled_ids_N=pair.written,
        temperature=pair.temperature,
        group=group,
        chunk_tokens=50,
        num_top=2,
    )
    grads = list(torch.autograd.grad(output.loss, leaves))
    if rank is not None:
        dist.all_reduce(grads[0])
        parts = [torch.empty_like(grads[1]) for _ in range(RANKS)]
        dist.all_gather(parts, grads[1])
        grads[1] = torch.cat(parts)
    return output, grads


def compare_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for name, merges in KINDS.items():
        tokens = map_of(
            *(byte_level(Path(folder) / f"{rank}" / name / str(index), one) for index, one in enumerate(merges))
        )
        for temperature in (1.0, 0.7):
            pair = Pair(tokens, temperature=temperature)
            scores = pair.by_topk().first(2)
            teachers: list[TopK | TeacherHidden] = [
                pair.by_hidden(support, topk=2) for support in ("teacher", "student", "union", "full")
            ]
            known = TopK(
                scores.topk_ids.long(), scores.topk_logp.double(), scores.sampled_logp.double(), teachers[0].groups
            )
            for teacher in [*teachers, known]:
                for kl_type in ("forward", "jsd"):
                    (one, expected), (other, found) = (run(pair, teacher, kl_type, at) for at in (None, rank))
                    for field in fields(HeadOutput):
                        if field.name not in ("teacher_top_ids_NM", "top_ids_NM"):
                            got, want = getattr(other, field.name), getattr(one, field.name)
                            if field.name == "kl_reverse_N":  # what a teacher has of nothing is rounding
                                has_rest = one.teacher_mass_N < 1 - 1e-6
                                got, want = got[has_rest], want[has_rest]
                            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7, msg=f"{name} {field.name}")
                    for got, want in zip(found, expected, strict=True):
                        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_two_shards_equal_the_whole(tmp_path: Path) -> None:
    mp.spawn(compare_on_rank, args=(str(tmp_path),), nprocs=RANKS)
