"""Shapes and layouts whose memory is measured and predicted; `memory_rank.py` is a rank's side."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill_cli.config.schema import Checkpointing, LoraConfig, MeshConfig, Precision, TrainConfig
from distill_cli.memory.shape import ModelShape, shape_of
from distill_cli.memory.trainer_bytes import Step, trainer_moments
from distill_cli.types import HiddenSize
from tests.student.forked import run_cases


def model(*, vocab: int, hidden: int, mlp: int, layers: int, tied: bool = True) -> dict[str, Any]:
    heads = hidden // 64
    return {
        **{"model_type": "qwen3", "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp},
        **{"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2},
        **{"head_dim": 64, "tie_word_embeddings": tied},
    }


SMALL = model(vocab=4096, hidden=256, mlp=768, layers=4)
WIDE = model(vocab=1024, hidden=512, mlp=2048, layers=4, tied=False)
"""Its parameters are most of its memory."""
LARGE = model(vocab=151_936, hidden=256, mlp=1024, layers=12)
"""52M parameters, most of them the vocabulary's."""
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
DELTA_NET = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
MAMBA = {
    **{"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_n_groups": 1, "mamba_chunk_size": 64},
    "attn_layer_indices": [3],
}
MLA = {
    **{"q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 64},
    "phi3": {"pad_token_id": 0},
    "gpt_neox": {},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "gpt_oss": {**EXPERTS, "intermediate_size": 256, "sliding_window": 128},
    "deepseek_v3": {**EXPERTS, **MLA},
    "qwen3_next": {**EXPERTS, **DELTA_NET, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 256},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "bamba": MAMBA,
}
"""What sets families apart from SMALL."""
WITH_STATE = ("qwen3_next", "lfm2", "bamba")


@dataclass(frozen=True)
class Case:
    model: dict[str, Any] = field(hash=False)
    ranks: int = 1
    mesh: dict[str, Any] = field(default_factory=dict, hash=False)
    activation_checkpointing: str = "none"
    precision: str = "fp32"
    tokens: int = 2048
    topk: int = 64
    micro_batches: int = 1
    lora: int | None = None
    """The rank of adapters."""
    rows: bool = False
    """One document a row."""
    teachers: tuple[tuple[int, ...], ...] = ()
    """`HiddenSize` of each teacher that returns hidden states; the first one's answers are scored."""
    support: str = "teacher"

    @property
    def step(self) -> Step:
        kept, mesh = Checkpointing[self.activation_checkpointing], MeshConfig(**self.mesh)
        train = TrainConfig(precision=Precision[self.precision], activation_checkpointing=kept)
        num_sharers = self.ranks // (mesh.tensor * mesh.replicate)
        ids = {"full": 0, "union": 2 * self.topk}.get(self.support, self.topk)
        sizes = self.tokens, ids, self.micro_batches, num_sharers
        return Step(
            train, mesh, *sizes, length=self.tokens // 2, teachers=tuple(HiddenSize(*one) for one in self.teachers)
        )

    @property
    def shape(self) -> ModelShape:
        config = AutoConfig.for_model(**self.model)
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        shapes = {name: tuple(param.shape) for name, param in lm.named_parameters()}
        return shape_of(config.to_dict(), shapes, LoraConfig(rank=self.lora))


def family_case(family: str, **settings: Any) -> Case:
    """Return the case of a family's small model."""
    heads = {} if family in ("qwen3_next", "gemma2", "gpt_oss", "qwen3_moe") else {"head_dim": None}
    model = {name: value for name, value in (SMALL | heads).items() if value is not None}
    return Case(model | {"model_type": family} | FAMILIES[family], rows=family in WITH_STATE, **settings)


HIDDEN: dict[str, Case] = {
    "full": Case(SMALL, tokens=1024, teachers=((384, 4),), support="full"),
    "union, bf16": Case(SMALL, precision="bf16", tokens=1024, teachers=((384, 2),), support="union"),
    "student, two teachers, shard=2": Case(SMALL, 2, tokens=1024, teachers=((384, 4), (256, 4)), support="student"),
    "full, tensor=2": Case(SMALL, 2, {"tensor": 2}, tokens=1024, teachers=((384, 4),), support="full"),
    "teacher, other tokens": Case(SMALL, tokens=1024, teachers=((384, 4, 6144),)),
    "full, other tokens": Case(SMALL, tokens=1024, teachers=((384, 4, 6144),), support="full"),
    "full, other tokens, tensor=2": Case(
        SMALL, 2, {"tensor": 2}, tokens=1024, teachers=((384, 4, 6144),), support="full"
    ),
    "full, large vocabulary": Case(
        LARGE | {"num_hidden_layers": 2},
        activation_checkpointing="full",
        tokens=256,
        teachers=((384, 4),),
        support="full",
    ),
}
"""Teachers that return hidden states."""
CHECKPOINTING = ("none", "selective", "full")
TABLE: dict[str, Case] = {
    **{
        f"small, {precision}, {which}": Case(SMALL, activation_checkpointing=which, precision=precision)
        for precision in ("fp32", "bf16")
        for which in CHECKPOINTING
    },
    **{f"small, shard=2, {which}": Case(SMALL, 2, activation_checkpointing=which) for which in CHECKPOINTING},
    "small, shard=2, bf16, full": Case(SMALL, 2, activation_checkpointing="full", precision="bf16"),
    **{
        f"small, tensor=2, {which}": Case(SMALL, 2, {"tensor": 2}, activation_checkpointing=which)
        for which in CHECKPOINTING
    },
    "small, tensor=2, sequence parallel": Case(SMALL, 2, {"tensor": 2, "sequence_parallel": True}),
    "small, context=2": Case(SMALL, 2, {"context": 2}),
    "small, replicate=2": Case(SMALL, 2, {"replicate": 2}),
    "wide, fp32": Case(WIDE, tokens=64),
    "wide, shard=2": Case(WIDE, 2, tokens=64),
    "wide, shard=2, bf16": Case(WIDE, 2, tokens=64, precision="bf16"),
    "wide, 2 micro-batches": Case(WIDE, tokens=64, micro_batches=2),
    "wide, shard=2, 3 micro-batches": Case(WIDE, 2, tokens=64, micro_batches=3),
    **{
        f"{family}, bf16": Case(SMALL | {"model_type": family}, precision="bf16")
        for family in ("llama", "qwen2", "mistral", "gemma3_text")
    },
    "gemma3_text, selective": Case(SMALL | {"model_type": "gemma3_text"}, activation_checkpointing="selective"),
    **{
        f"small, LoRA, {precision}, {which}": Case(SMALL, activation_checkpointing=which, precision=precision, lora=8)
        for precision in ("fp32", "bf16")
        for which in CHECKPOINTING
    },
    "small, LoRA, shard=2": Case(SMALL, 2, lora=8),
    "small, LoRA, tensor=2": Case(SMALL, 2, {"tensor": 2}, lora=8),
    "wide, LoRA": Case(WIDE, tokens=64, lora=8),
    "wide, LoRA, bf16": Case(WIDE, tokens=64, precision="bf16", lora=8),
    "wide, LoRA, shard=2": Case(WIDE, 2, tokens=64, lora=8),
    "wide, LoRA, 2 micro-batches": Case(WIDE, tokens=64, micro_batches=2, lora=8),
    "gemma3_text, LoRA": Case(SMALL | {"model_type": "gemma3_text"}, lora=8),
    "large, LoRA, bf16, full": Case(LARGE, activation_checkpointing="full", precision="bf16", tokens=1024, lora=8),
    "large, full": Case(LARGE, activation_checkpointing="full", tokens=1024),
    "large, bf16, full": Case(LARGE, activation_checkpointing="full", precision="bf16", tokens=1024),
    "large, shard=2, bf16, full": Case(LARGE, 2, activation_checkpointing="full", precision="bf16", tokens=1024),
    **{
        f"{family}, {precision}, {which}": family_case(family, precision=precision, activation_checkpointing=which)
        for family in FAMILIES
        for precision in ("fp32", "bf16")
        for which in CHECKPOINTING
    },
    "large, tensor=2, selective": Case(LARGE, 2, {"tensor": 2}, activation_checkpointing="selective", tokens=1024),
}


def measure(cases: Iterable[Case]) -> dict[Case, dict[str, int]]:
    """Bytes of rank 0 in its second step, by part and at the peak; see `parts_of`."""
    cases = list(cases)
    results = run_cases("tests.student.memory_rank", [vars(case) for case in cases])
    return {case: parts_of(*result) for case, result in zip(cases, results, strict=True)}


def parts_of(begin: int, marks: list[tuple[str, int, int]]) -> dict[str, int]:
    """Return the separable parts of a step's (mark, bytes then, most bytes until the next).

    `begin` is what its tensors held when it began: the account itself is of one thread, and never hears of buffers that
    gloo's threads were the last to let go.
    """
    first = max(index for index, mark in enumerate(marks) if mark[0] == "step")
    step = marks[first:]
    lost, at = step[0][1] - begin, {name: (live, peak) for name, live, peak in step}
    return {
        "weights and optimizer": begin,
        "gathered and activations": at["head"][0] - lost - begin,
        "loss": at["head"][1] - at["head"][0],
        "peak": max(peak for _, _, peak in step) - lost,
    }


def predict(case: Case, *, on_gpu: bool = False) -> dict[str, int]:
    """The same by arithmetic."""
    moments = trainer_moments(case.shape, replace(case.step, on_gpu=on_gpu))
    parts = moments[0].parts
    return {
        "weights and optimizer": parts["weights"] + parts["optimizer"],
        "gathered and activations": parts["gathered"] + parts["activations"] + parts["gradients"],
        "loss": parts["loss"],
        "peak": max(moment.total for moment in moments),
    }
