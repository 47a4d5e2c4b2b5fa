"""The memory of a training step: straight in the number of tokens, and never a tensor of [tokens, vocabulary]."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.rollout.pack import MicroBatch, lay_out, plan_batch
from distill_cli.student import attention
from distill_cli.student.model import Student, checkpoint_activations
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores

VOCAB, TOPK = 50_000, 8


class Watch(TorchDispatchMode):
    """The peak of what operators' results hold, and the most elements that one has."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor)
        return result

    def _hold(self, tensor: torch.Tensor) -> None:
        self.largest = max(self.largest, tensor.numel())
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            return
        self.held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.held.pop(key, 0)


@pytest.fixture(scope="module")
def student() -> Student:
    attention.register()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, attn_implementation=attention.NAME,
    )  # fmt: skip
    lm = Qwen3ForCausalLM(config).train()
    checkpoint_activations(lm, "full")
    return Student(lm, objective=Objective(DistillLoss(kl_type="mixed")))


def one_sequence(length: int) -> MicroBatch:
    num_response = length - 1
    ids = torch.randint(0, VOCAB, (length,)).tolist()
    scores = TeacherScores.of_topk(
        torch.arange(TOPK, dtype=torch.int32).repeat(num_response, 1),
        torch.full((num_response, TOPK), -3.0),
        torch.full((num_response,), -3.0),
    )
    rollout = Rollout(Prompt(0, ids[:1], Example("q")), Sample(ids[1:], [-1.0] * num_response, "stop"))
    ((row,),) = plan_batch([length], num_ranks=1, max_tokens=length).rows
    return lay_out(row, [rollout], {0: scores})


def watch_step(student: Student, length: int) -> Watch:
    batch = one_sequence(length)
    with Watch() as watch:
        loss, output = student(batch, num_loss_tokens=torch.tensor(float(length)))
        loss.backward()
        del loss, output
    student.zero_grad()
    return watch


def test_step_memory_is_linear_without_logits(student: Student) -> None:
    lengths = (1024, 2048, 4096)
    watched = [watch_step(student, length) for length in lengths]
    first, second = (b.peak - a.peak for a, b in itertools.pairwise(watched))
    assert 0 < second < 2.2 * first
    for length, watch in zip(lengths, watched, strict=True):
        assert watch.largest < length * VOCAB / 2, f"a tensor of {watch.largest} elements at {length} tokens"
        assert watch.peak > 4 * VOCAB * 32  # the head's gradient: the watch sees what is made


def test_the_watch_finds_logits(student: Student) -> None:
    batch = one_sequence(512)
    with Watch() as watch, torch.no_grad(), attention.documents_of(batch.documents):
        student.lm(input_ids=batch.input_ids, position_ids=batch.position_ids)
    assert watch.largest >= 512 * VOCAB
