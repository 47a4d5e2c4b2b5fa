"""The predicted memory of a training step, by part and at its peak, against what torch allocates."""

from __future__ import annotations

import pytest

from distill_cli.config.schema import Checkpointing, MeshConfig, Precision, TrainConfig
from distill_cli.engines.settings import CPU_KV_CACHE_BYTES
from distill_cli.losses import softmax
from distill_cli.memory.engine_bytes import CPU_KV_CACHE_GIB
from distill_cli.memory.trainer_bytes import BLOCK_ELEMENTS, QUERY_ROWS, Step, trainer_moments
from distill_cli.student import attention
from tests.student.measured_memory import FAMILIES, HIDDEN, LARGE, SMALL, WIDE, Case, family_case, measure, predict

LIMIT = 0.15
ALONE = {
    "none": Case(SMALL, tokens=1024),
    "selective, bf16": Case(SMALL, activation_checkpointing="selective", precision="bf16", tokens=1024),
    "full": Case(SMALL, activation_checkpointing="full", tokens=1024),
    "wide, 2 micro-batches": Case(WIDE, tokens=64, micro_batches=2),
    "gemma3, bf16": Case(SMALL | {"model_type": "gemma3_text"}, precision="bf16", tokens=1024),
    "LoRA": Case(SMALL, tokens=1024, lora=8),
    "LoRA, wide, bf16": Case(WIDE, tokens=64, precision="bf16", lora=8),
    "large vocabulary": Case(LARGE | {"num_hidden_layers": 2}, activation_checkpointing="full", tokens=256),
}
ALONE |= {name: case for name, case in HIDDEN.items() if case.ranks == 1}
ALONE |= {family: family_case(family, tokens=1024) for family in FAMILIES}
ALONE |= {
    "gemma2, selective, long documents": family_case("gemma2", activation_checkpointing="selective", tokens=2048),
    "gpt_oss, bf16, full": family_case("gpt_oss", precision="bf16", activation_checkpointing="full", tokens=1024),
    "qwen3_next, full": family_case("qwen3_next", activation_checkpointing="full", tokens=1024),
    "qwen3_moe, LoRA": family_case("qwen3_moe", tokens=1024, lora=8),
}
TOGETHER = {
    **{name: case for name, case in HIDDEN.items() if case.ranks > 1},
    "shard=2": Case(WIDE, 2, tokens=64),
    "shard=2, bf16": Case(SMALL, 2, precision="bf16", activation_checkpointing="full", tokens=1024),
    "tensor=2": Case(SMALL, 2, {"tensor": 2}, tokens=1024),
    "experts, shard=2": family_case("qwen3_moe", ranks=2, tokens=1024),
    "experts, expert=2": family_case("qwen3_moe", ranks=2, mesh={"expert": 2}, tokens=1024),
}


@pytest.fixture(scope="module")
def measured() -> dict[Case, dict[str, int]]:
    return measure([*ALONE.values(), *TOGETHER.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
@pytest.mark.exhaustive
def test_one_rank_by_part_and_peak(name: str, measured: dict[Case, dict[str, int]]) -> None:
    expected, predicted = measured[ALONE[name]], predict(ALONE[name])
    for part in expected:
        assert predicted[part] == pytest.approx(expected[part], rel=LIMIT, abs=2**20), part


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGETHER)
@pytest.mark.exhaustive
def test_two_ranks(name: str, measured: dict[Case, dict[str, int]]) -> None:
    expected, predicted = measured[TOGETHER[name]], predict(TOGETHER[name])
    for part in ("weights and optimizer", "loss", "peak"):
        assert predicted[part] == pytest.approx(expected[part], rel=LIMIT, abs=2**20), part


def test_constants_match_engines_and_student() -> None:
    assert CPU_KV_CACHE_GIB * 2**30 == CPU_KV_CACHE_BYTES
    assert QUERY_ROWS == attention.QUERY_ROWS
    assert BLOCK_ELEMENTS == softmax.BLOCK_ELEMENTS


@pytest.mark.parametrize("bf16", [False, True])
def test_fewer_activations_need_less(bf16: bool) -> None:
    case, peaks = Case(SMALL), []
    precision = Precision.bf16 if bf16 else Precision.fp32
    for kept, tokens, num_ranks in (
        (Checkpointing.none, 4096, 1),
        (Checkpointing.selective, 4096, 1),
        (Checkpointing.full, 4096, 1),
        (Checkpointing.full, 512, 1),
        (Checkpointing.full, 512, 8),
    ):
        train = TrainConfig(precision=precision, activation_checkpointing=kept)
        step = Step(train, MeshConfig(), tokens=tokens, topk=64, parameter_ranks=num_ranks)
        peaks.append(max(moment.total for moment in trainer_moments(case.shape, step)))
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(peaks)


@pytest.mark.gpu
def test_one_gpu_at_its_peak() -> None:
    from tests.student.memory_rank import peak_on_gpu

    case = Case(LARGE, activation_checkpointing="full", precision="bf16", tokens=4096)
    assert predict(case, on_gpu=True)["peak"] == pytest.approx(peak_on_gpu(vars(case)), rel=LIMIT)
