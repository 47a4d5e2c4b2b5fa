"""The operations that training needs, counted by hand for a small model."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.student.flops import peak_flops, train_flops
from distill_cli.student.model import Student


@pytest.mark.parametrize("tied", [True, False])
def test_head_counts_for_response_tokens_only(tied: bool) -> None:
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    student = Student(Qwen3ForCausalLM(config), loss=DistillLoss(kl_type="mixed"), temperature=1.0)
    attention = 16 * 16 + 2 * (16 * 8) + 16 * 16 + 2 * 8  # q, k and v, o, and the norms of q and k
    body = attention + 3 * 16 * 32 + 3 * 16  # the MLP; two norms of the layer and the last one
    assert train_flops(student, num_tokens=10, num_response_tokens=4) == 6 * (body * 10 + 50 * 16 * 4)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
