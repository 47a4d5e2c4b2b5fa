"""Models that cannot be trained, scored with, or cut: what is said of them before an engine starts."""

import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

from distill_cli.config.compose import compose
from distill_cli.errors import ConfigError
from distill_cli.jobs.plan_tables import parameter_row, step_rows
from distill_cli.jobs.preflight import preflight, preflight_evaluation
from distill_cli.jobs.run_panels import layout_row
from distill_cli.models import tried_families
from distill_cli.models.tensor_plan import declared_plan
from tests.jobs.problems import FEW_RANKS, MakeModel, pair, problems_of

LFM2 = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
EXPERTS = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}


def test_state_gives_documents_their_rows(make_model: MakeModel) -> None:
    (job,) = compose([*pair(make_model("s", **LFM2), make_model("t")), "train.packing=true"])
    found = preflight(job.config)
    assert not found.config.train.packing
    assert found.warnings == ()
    layout = "rows of one document each: its conv layers carry state"
    assert step_rows(found)["layout"] == layout
    assert layout_row(found) == layout
    (job,) = compose(pair(make_model("plain"), make_model("t2")))
    assert preflight(job.config).config.train.packing
    assert layout_row(preflight(job.config)) is None


def test_state_and_experts_are_not_cut(make_model: MakeModel) -> None:
    teacher = make_model("t")
    conv, experts = pair(make_model("c", **LFM2), teacher), pair(make_model("e", **EXPERTS), teacher)
    context, tensor = [*FEW_RANKS, "mesh.context=2"], [*FEW_RANKS, "mesh.tensor=2"]
    assert "mesh.context=2: ranks cannot share sequences of this student (its conv layers carry state)" in problems_of(
        *conv, *context
    )
    assert "mesh.tensor=2: lfm2 has conv layers, which are not cut; set it to 1" in problems_of(*conv, *tensor)
    assert "mesh.tensor=2: qwen2_moe has experts, which are not cut" in problems_of(*experts, *tensor)


def test_sizes_by_layer_are_not_cut(make_model: MakeModel) -> None:
    sizes = {"num_hidden_layers": 2, "intermediate_size": [16, 32], "layer_types": ["full_attention"] * 2}
    student = make_model("s", model_type="gemma3n_text", **sizes)
    problems = problems_of(*pair(student, make_model("t")), *FEW_RANKS, "mesh.tensor=2")
    assert "mesh.tensor=2: the student's layers differ in the MLP's size; set it to 1" in problems


def test_experts_divide_over_their_ranks(make_model: MakeModel) -> None:
    teacher, expert = make_model("t"), [*FEW_RANKS, "mesh.expert=3"]
    experts, dense = make_model("e", **EXPERTS), make_model("d")
    assert "mesh.expert=3: does not divide the 4 experts; choose one of 1, 2, 4" in problems_of(
        *pair(experts, teacher), *expert
    )
    assert "mesh.expert=3: the student (llama) has no experts" in problems_of(*pair(dense, teacher), *expert)
    (job,) = compose([*pair(experts, teacher), *FEW_RANKS, "mesh.expert=2"])
    preflight(job.config)


HEAD = {"architectures": ["LlamaForCausalLM"]}
CUSTOM = {"auto_map": {"AutoModelForCausalLM": "modeling.Own"}, **HEAD}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"quantized \(mxfp4\) .*=Mxfp4Config\(dequantize=True\)"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantized \(awq\) .* dequantized copy in bfloat16"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5 is an encoder-decoder; give a causal LM"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM does not predict the next token"),
        ({"model_type": "bert9", **HEAD}, r"transformers [\d.]+ has no model_type bert9"),
        ({"model_type": "bert9", **CUSTOM}, "model_type bert9 is code in its folder; set model.trust_remote_code=true"),
        ({"model_type": None, **HEAD}, "has no model_type"),
        ({"model_type": "clip"}, "has no causal LM of model_type clip; give another"),
        ({"model_type": "mistral3"}, "has no causal LM of model_type mistral3"),
        ({"model_type": "bert"}, "bert is an encoder, which sees the tokens that it is to predict; give a causal LM"),
        ({"use_bidirectional_attention": True}, "its tokens see later ones; give a causal LM"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM, which is no class of its model_type llama"),
        ({"model_type": "deepseek_v32", "index_topk": 2048}, "an indexer chooses the keys"),
        ({"hidden_size": 7}, "config.json says hidden_size=7, and no tensor has that size"),
    ],
)
def test_students_that_cannot_be_trained(config: dict[str, Any], problem: str, make_model: MakeModel) -> None:
    student = make_model("s", **config)
    problems = problems_of(*pair(student, make_model("t")))
    assert re.fullmatch(f"model.student.path={student}: .*{problem}.*", problems)


def test_quantized_tensors_are_no_students(make_model: MakeModel) -> None:
    student = make_model("s")
    save_file({"a.weight": torch.zeros(2, 2, dtype=torch.uint8)}, student / "model.safetensors")
    assert "its weights are quantized (U8)" in problems_of(*pair(student, make_model("t")))


def test_teachers_may_be_quantized(make_model: MakeModel) -> None:
    teacher = make_model("t", model_type="bert9", quantization_config={"quant_method": "mxfp4"})
    (job,) = compose(pair(make_model("s"), teacher))
    preflight(job.config)
    teacher = make_model("t5", is_encoder_decoder=True)
    assert f"model.teacher.path={teacher}: llama is an encoder-decoder" in problems_of(*pair(make_model("s2"), teacher))


def test_trusted_code_is_taken(make_model: MakeModel) -> None:
    (job,) = compose(
        [*pair(make_model("s", model_type="own", **CUSTOM), make_model("t")), "model.trust_remote_code=true"]
    )
    preflight(job.config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "lfm2"])
def test_cut_weights_of_both_models(family: str, make_model: MakeModel) -> None:
    folders = [make_model(name, model_type=family) for name in ("s", "t")]
    for folder in folders:
        os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 8)
    problems = problems_of(*pair(*folders)).splitlines()
    assert len(problems) == 2
    for folder, problem in zip(folders, problems, strict=True):
        assert re.match(rf"{folder}/model.safetensors: is cut: its header describes \d+ bytes", problem)
    (job,) = compose(pair(*folders))
    with pytest.raises(ConfigError, match="is cut"):
        preflight_evaluation(job.config, role="teacher")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"num_attention_heads": "four"}, "num_attention_heads='four', must be a number from 1"),
        ({"num_hidden_layers": [1, 2.5]}, r"num_hidden_layers=\[1, 2.5\], must be a number from 1"),
        ({"layer_types": "conv"}, "layer_types='conv', must be a list of str"),
        ({"layer_types": ["conv"], "num_hidden_layers": 2}, "layer_types names 1 layers, and there are 2"),
        ({"head_dim": 0}, "head_dim=0, must be a number from 1"),
        ({"hidden_size": True}, "hidden_size=True, must be a number from 1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes', must be true or false"),
        ({"architectures": 5}, "architectures=5, must be a list of texts"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\], must be a text"),
    ],
)
def test_wrong_fields_of_a_config(config: dict[str, Any], problem: str, make_model: MakeModel) -> None:
    student = make_model("s", **config)
    problems = problems_of(*pair(student, make_model("t")))
    assert re.fullmatch(f"{student}/config.json: {problem}; correct it, or download the model again", problems)


def test_multimodal_classes_are_taken(make_model: MakeModel) -> None:
    published = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]}
    (job,) = compose(pair(make_model("m", **published), make_model("t")))
    preflight(job.config)


def test_plan_shows_active_parameters(make_model: MakeModel) -> None:
    student = make_model("s", **EXPERTS)
    shapes = {"layers.0.mlp.experts.gate_up_proj": (4, 100, 60), "embed_tokens.weight": (8, 150)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, student / "model.safetensors")
    (job,) = compose(pair(student, make_model("t")))
    assert parameter_row(preflight(job.config)) == "25.2k, 13.2k active"
    (job,) = compose(pair(make_model("plain"), make_model("t2")))
    assert parameter_row(preflight(job.config)) == "12"


TENSORS = {
    "model.embed_tokens.weight": (8, 4),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.norm.weight": (4,),
}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"vocab_size": 9}, "config.json says vocab_size=9, and the embedding has 8 rows"),
        ({"num_hidden_layers": 2}, "config.json says 2 layers, and the files have 1"),
        ({"tie_word_embeddings": False}, "it has no head over its vocabulary"),
    ],
)
def test_files_that_contradict_config_json(config: dict[str, Any], problem: str, make_model: MakeModel) -> None:
    folders = [make_model(name, **config) for name in ("s", "t")]
    for folder in folders:
        save_file({name: torch.zeros(shape) for name, shape in TENSORS.items()}, folder / "model.safetensors")
    problems = problems_of(*pair(*folders))
    for role, folder in zip(("student", "teacher"), folders, strict=True):
        assert f"model.{role}.path={folder}: {problem}" in problems


def test_losses_of_routers_that_are_not_there(make_model: MakeModel) -> None:
    teacher, key = make_model("t"), "train.router_aux_loss=0.1"
    for name, config in {"dense": {}, "without": {"model_type": "deepseek_v3", "n_routed_experts": 4}}.items():
        problems = problems_of(*pair(make_model(name, **config), teacher), key)
        assert f"{key}: {config.get('model_type', 'llama')} has no auxiliary loss for a router" in problems
    (job,) = compose([*pair(make_model("e", **EXPERTS), teacher), key])
    preflight(job.config)


def test_frequencies_that_depend_on_the_length(make_model: MakeModel) -> None:
    rope = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 100}
    student = make_model("s", model_type="phi3", **rope)
    keys = "rollout.max_sequence_length=128", "eval.max_new_tokens=8"
    problems = problems_of(*pair(student, make_model("t")), *keys)
    assert "sequences of up to 128 tokens: beyond 100 tokens the student's frequencies are others" in problems


def test_attention_of_its_own_gets_rows(make_model: MakeModel) -> None:
    (job,) = compose(pair(make_model("s", model_type="bloom"), make_model("t")))
    found = preflight(job.config)
    assert not found.config.train.packing
    assert layout_row(found) == "rows of one document each: its attention is code of its own"


def test_a_layout_that_failed_is_refused(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = {"one rank": 1e-7, "context": "failed: RuntimeError: sizes"}
    monkeypatch.setattr(tried_families, "tried", lambda: {"llama": tried_families.Family("llama", layouts, {})})
    problems = problems_of(*pair(make_model("s"), make_model("t")), *FEW_RANKS, "mesh.context=2")
    assert "mesh.context=2: students of llama were tried: failed: RuntimeError: sizes; set it to 1" in problems


def test_plans_of_ranks_without_torch() -> None:
    code = "import sys; from distill_cli.models.tensor_plan import declared_plan as p; assert p('qwen3'); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)
    assert declared_plan("qwen3") == dict(Qwen3Config.base_model_tp_plan)
