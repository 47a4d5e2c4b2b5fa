"""The prediction around the trainer's own: model folders, engines, what fits, and which key to turn."""

from __future__ import annotations

import math

import pytest

from distill_cli import memory
from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.schema import Config, Dtype
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight
from distill_cli.models import model_files
from distill_cli.verbs.plan import memory_rows

STUDENT, TEACHER = (model_files.ASSETS / "tiny_pair" / role for role in ("student", "teacher"))
LARGE = memory.ModelShape(
    vocab=151_936, hidden=2048, query=2048, key=1024, mlp=6144, num_heads=16, num_key_heads=8, num_layers=28,
    layer_params=50_335_000, tied=True, num_norms=2, has_head_norms=True, float32_norms=False,
)  # fmt: skip


def config_of(*overrides: str) -> Config:
    (job,) = compose(["cluster.gpus_per_node=0", *overrides])
    return job.config


def problem(config: Config, *, total: int, is_gpu: bool = False, ranks: int = 1, shape=None) -> str | None:
    return memory.problem(
        config,
        shape or memory.read_shape(STUDENT),
        STUDENT,
        TEACHER,
        num_ranks=ranks,
        ranks_here=ranks,
        device=memory.Device(total, is_gpu),
    )


def test_a_folder_says_the_models_shape() -> None:
    shape = memory.read_shape(STUDENT)
    assert (shape.vocab, shape.hidden, shape.mlp, shape.num_layers) == (512, 128, 256, 3)
    assert (shape.query, shape.key, shape.num_key_heads, shape.num_norms) == (128, 64, 2, 2)
    assert shape.has_head_norms
    assert shape.num_params == sum(math.prod(size) for _, size in model_files.tensors(STUDENT).values())


def test_other_families_have_no_prediction() -> None:
    with pytest.raises(memory.NoPrediction, match="gpt2 is none of"):
        memory.shape_of({"model_type": "gpt2"}, {})
    with pytest.raises(memory.NoPrediction, match="embed_tokens"):
        memory.shape_of({"model_type": "llama", "num_attention_heads": 4}, {})


def test_engines_by_dtype_quantization_ranks_and_cache() -> None:
    whole = memory.engine_weights(TEACHER, Dtype.float32, None, tensor_parallel=1)
    assert whole == 4 * sum(math.prod(size) for _, size in model_files.tensors(TEACHER).values())
    assert memory.engine_weights(TEACHER, Dtype.bfloat16, None, tensor_parallel=2) == whole / 4
    assert whole / 4 < memory.engine_weights(TEACHER, Dtype.bfloat16, "fp8", tensor_parallel=1) < whole / 2
    with pytest.raises(memory.NoPrediction, match="awq"):
        memory.engine_weights(TEACHER, Dtype.bfloat16, "awq", tensor_parallel=1)
    for engine, gpu_bytes, expected in (
        (EngineModelConfig(kv_cache_gib=2.0), None, whole + 2 * 2**30),
        (EngineModelConfig(kv_cache_gib=None), None, whole + 2**28),
        (EngineModelConfig(gpu_memory_utilization=0.25), 80 * 2**30, 20 * 2**30),
    ):
        found = memory.engine_bytes(TEACHER, Dtype.float32, None, engine, tensor_parallel=1, gpu_bytes=gpu_bytes)
        assert found == expected


def test_engines_asleep_and_trainer_take_turns() -> None:
    trainer = memory.Moment("the loss", {"weights": 10, "activations": 30})
    awake = memory.Prediction(trainer, {"sampler": 20, "scorer": 25}, resting=10)
    assert awake.peak == 40 + 45
    assert memory.Prediction(trainer, awake.engines, 10, asleep=("scorer",)).peak == 40 + 20
    assert memory.Prediction(trainer, awake.engines, 10, asleep=("sampler", "scorer")).peak == 40


def test_what_does_not_fit_is_said_with_keys_that_make_it_fit() -> None:
    config = config_of("train.micro_batch_tokens=8192")
    assert problem(config, total=2**34) is None
    said = problem(config, total=300 * 2**20)
    assert "a rank needs about" in said
    for part in ("weights", "optimizer", "activations", "loss", "sampler", "scorer"):
        assert part in said
    keys = [word for word in said.split("; set ")[1].split() if "=" in word]
    assert any(key.startswith(("train.micro_batch_tokens=", "train.activation_checkpointing=")) for key in keys)
    for key in keys:
        assert problem(config_of("train.micro_batch_tokens=8192", key), total=300 * 2**20) is None, key
    assert "no single key" in problem(config, total=2**20)


def test_every_rank_of_a_host_counts() -> None:
    config = config_of()
    assert problem(config, total=2**30, ranks=1) is None
    assert "(8 ranks)" in problem(config, total=2**30, ranks=8)


def test_keys_of_gpus_are_named_there_alone() -> None:
    config = config_of("train.micro_batch_tokens=16384", "engine=default", "train=default", "cluster.gpus_per_node=0")
    said = problem(config, total=24 * 2**30, is_gpu=True, shape=LARGE)
    assert "its GPU has 24.0 GiB" in said
    assert "train.cpu_offload=true" in said
    assert "cpu_offload" not in problem(config, total=2**30, shape=LARGE)


def test_a_run_that_cannot_fit_is_refused_and_one_that_does_is_printed() -> None:
    with pytest.raises(ConfigError, match="engine.student.kv_cache_gib="):
        preflight(config_of("engine.student.kv_cache_gib=100000"))
    rows = memory_rows(preflight(config_of()))
    assert {*memory.PARTS, "sampler", "scorer", "peak", "of"} <= rows.keys()


def test_two_ways_of_offloading_are_refused() -> None:
    with pytest.raises(ConfigError, match="offload_optimizer=true.*drop one"):
        preflight(config_of("train.cpu_offload=true", "train.offload_optimizer=true"))
