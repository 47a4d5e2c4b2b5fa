"""The operations that training needs, counted by hand for a small model."""

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3Config, Qwen3ForCausalLM

from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.student.flops import peak_flops, train_flops
from distill_cli.student.model import Student


@pytest.mark.parametrize("tied", [True, False])
def test_head_counts_for_response_tokens_only(tied: bool) -> None:
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    student = Student(Qwen3ForCausalLM(config), objective=Objective(DistillLoss(kl_type="mixed")))
    attention = 16 * 16 + 2 * (16 * 8) + 16 * 16 + 2 * 8  # q, k and v, o, and the norms of q and k
    body = attention + 3 * 16 * 32 + 3 * 16  # the MLP; two norms of the layer and the last one
    assert train_flops(student, num_tokens=10, num_response_tokens=4) == 6 * (body * 10 + 50 * 16 * 4)


def test_experts_count_if_they_compute() -> None:
    config = Qwen2MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        moe_intermediate_size=8, shared_expert_intermediate_size=12, num_experts=5, num_experts_per_tok=2,
        qkv_bias=False,
    )  # fmt: skip
    student = Student(Qwen2MoeForCausalLM(config), objective=Objective(DistillLoss(kl_type="mixed")))
    attention = 16 * 16 + 2 * (16 * 8) + 16 * 16
    experts = 2 * 3 * 16 * 8 + 3 * 16 * 12 + 16 * 5 + 16  # two of five, the shared one, the router and the shared gate
    body = attention + experts + 3 * 16
    assert train_flops(student, num_tokens=10, num_response_tokens=4) == pytest.approx(6 * (body * 10 + 50 * 16 * 4))


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
