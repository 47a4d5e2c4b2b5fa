"""The prediction around the trainer's own: model folders, engines, what fits, and which key to turn."""

from __future__ import annotations

import math

import pytest

from distill_cli import memory
from distill_cli.config.compose import compose
from distill_cli.config.execution_schema import EngineModelConfig
from distill_cli.config.schema import Config, Dtype, TeacherModel
from distill_cli.errors import ConfigError
from distill_cli.jobs.plan_tables import memory_rows
from distill_cli.jobs.preflight import preflight
from distill_cli.memory.engine_bytes import engine_bytes, engine_weights
from distill_cli.memory.layers import LayerShape
from distill_cli.memory.shape import ModelShape, shape_of
from distill_cli.memory.trainer_bytes import PARTS
from distill_cli.memory.verdict import peak_bytes
from distill_cli.models import model_files

STUDENT, TEACHER = (model_files.ASSETS / "tiny_pair" / role for role in ("student", "teacher"))
LAYER = LayerShape(
    params=50_335_000, mlp_matrix=6144 * 2048, query=2048, key=1024, mlp=6144, mlp_wide=2 * 6144, has_head_norms=True
)
LARGE = ModelShape(
    vocab=151_936, hidden=2048, layers=(LAYER,) * 28, root_params=151_936 * 2048 + 2048, num_heads=16, family="qwen3"
)


def config_of(*overrides: str) -> Config:
    (job,) = compose(["cluster.gpus_per_node=0", *overrides])
    return job.config


def teacher(dtype: Dtype, quantization: str | None = None) -> TeacherModel:
    return TeacherModel(path="", dtype=dtype, quantization=quantization)


def problem(
    config: Config, *, total: int, is_gpu: bool = False, ranks: int = 1, shape: ModelShape | None = None
) -> str | None:
    return memory.problem(
        config,
        shape or memory.read_shape(STUDENT),
        STUDENT,
        {"teacher": TEACHER},
        num_ranks=ranks,
        device=memory.Device(total, is_gpu, ranks),
    )


def test_folder_gives_the_models_shape() -> None:
    shape = memory.read_shape(STUDENT)
    layer = shape.layers[0]
    assert (shape.vocab, shape.hidden, len(shape.layers), shape.num_key_heads) == (512, 128, 3, 2)
    assert (layer.query, layer.key, layer.mlp, layer.mlp_wide, layer.norms) == (128, 64, 256, 512, 2)
    assert layer.has_head_norms
    assert shape.num_params == sum(math.prod(size) for _, size in model_files.tensors(STUDENT).values())


def test_layers_that_are_not_known() -> None:
    table = {"embed_tokens.weight": (8, 4)}
    for shapes, why in (
        ({}, "no matrix is called embed_tokens"),
        (table, "not called layers"),
        ({**table, "layers.0.norm.weight": (4,)}, "no attention and no MLP among norm.weight"),
        ({**table, "layers.0.self_attn.q_proj.weight": (4, 4)}, "no output matrix of attention"),
    ):
        with pytest.raises(memory.NoPrediction, match=why):
            shape_of({"model_type": "llama"}, shapes)
    with pytest.raises(memory.NoPrediction, match="quantized"):
        shape_of({"quantization_config": {"quant_method": "fp8"}}, table)


def test_engines_by_dtype_quantization_and_cache() -> None:
    whole = engine_weights(TEACHER, teacher(Dtype.float32), tensor_parallel=1)
    assert whole == 4 * sum(math.prod(size) for _, size in model_files.tensors(TEACHER).values())
    assert engine_weights(TEACHER, teacher(Dtype.bfloat16), tensor_parallel=2) == whole / 4
    assert whole / 4 < engine_weights(TEACHER, teacher(Dtype.bfloat16, "fp8"), tensor_parallel=1) < whole / 2
    with pytest.raises(memory.NoPrediction, match="awq"):
        engine_weights(TEACHER, teacher(Dtype.bfloat16, "awq"), tensor_parallel=1)
    for engine, gpu_bytes, expected in (
        (EngineModelConfig(kv_cache_gib=2.0), None, whole + 2 * 2**30),
        (EngineModelConfig(kv_cache_gib=None), None, whole + 2**28),
        (EngineModelConfig(gpu_memory_utilization=0.25), 80 * 2**30, 20 * 2**30),
    ):
        assert engine_bytes(TEACHER, teacher(Dtype.float32), engine, gpu_bytes=gpu_bytes) == expected


def test_engines_asleep_and_trainer_take_turns() -> None:
    engines = {"sampler": 20, "scorer": 25}
    assert peak_bytes(40, 10, engines, ()) == 40 + 45
    assert peak_bytes(40, 10, engines, ("scorer",)) == 40 + 20
    assert peak_bytes(40, 10, engines, ("sampler", "scorer")) == 40


def test_named_keys_make_it_fit() -> None:
    config = config_of("train.micro_batch_tokens=8192")
    assert problem(config, total=2**34) is None
    line = problem(config, total=300 * 2**20)
    assert line is not None
    for part in ("memory", "weights", "optimizer", "activations", "loss", "sampler", "scorer"):
        assert part in line
    keys = [word for word in line.split("; set ")[1].split() if "=" in word]
    assert any(key.startswith(("train.micro_batch_tokens=", "train.activation_checkpointing=")) for key in keys)
    for key in keys:
        assert problem(config_of("train.micro_batch_tokens=8192", key), total=300 * 2**20) is None, key
    assert "no single key" in str(problem(config, total=2**20))


def test_ranks_share_the_hosts_memory() -> None:
    config = config_of()
    assert problem(config, total=2**30, ranks=1) is None
    assert "(8 ranks)" in str(problem(config, total=2**30, ranks=8))


def test_keys_of_gpus_need_one() -> None:
    config = config_of("train.micro_batch_tokens=16384", "engine=default", "train=default", "cluster.gpus_per_node=0")
    line = problem(config, total=24 * 2**30, is_gpu=True, shape=LARGE)
    assert line is not None
    assert "24.0 GiB" in line
    assert "train.cpu_offload=true" in line
    assert "cpu_offload" not in str(problem(config, total=2**30, shape=LARGE))


def test_refused_unless_it_fits() -> None:
    with pytest.raises(ConfigError, match="engine.student.kv_cache_gib="):
        preflight(config_of("engine.student.kv_cache_gib=100000"))
    rows = memory_rows(preflight(config_of()))
    assert {*PARTS, "sampler", "scorer", "peak", "of"} <= rows.keys()


def test_two_ways_of_offloading_are_refused() -> None:
    with pytest.raises(ConfigError, match="offload_optimizer=true.*drop one"):
        preflight(config_of("train.cpu_offload=true", "train.offload_optimizer=true"))
