"""Adapters on frozen weights, compared with peft; their names and sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill_cli.checkpoint.store import Checkpoint, check_base
from distill_cli.config.checks import MAX_ENGINE_RANK
from distill_cli.engines.settings import ADAPTER_RANKS
from distill_cli.engines.weight_sync import Deferred, adapter_shapes, check_names_and_shapes, whole_tensors
from distill_cli.errors import ConfigError, DistillError
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.models.lora_names import shortened, targeted
from distill_cli.models.model_files import ModelFiles, fingerprint
from distill_cli.student.adapters import A, B, add_adapters, exported_name, initial_value, is_adapter, merged_parameters
from distill_cli.student.flops import train_flops
from distill_cli.student.model import Student
from tests.families import make_config


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def shapes_of(lm: LlamaForCausalLM) -> dict[str, tuple[int, ...]]:
    return {name: tuple(param.shape) for name, param in lm.named_parameters()}


def filled(lm: LlamaForCausalLM) -> LlamaForCausalLM:
    generator = torch.Generator().manual_seed(1)
    for name, param in list(lm.named_parameters()):
        if is_adapter(name):
            value = torch.randn(param.shape, generator=generator) / 4
            lm.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(value)
    return lm


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "mixtral"])
def test_shared_experts_are_not_taken_for_experts(family: str) -> None:
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(make_config(family))
    layers = targeted(shapes_of(lm), None).keys()
    add_adapters(lm, rank=2, targets=None, bf16=False)
    assert {name.removesuffix(f".{A}") for name, _ in lm.named_parameters() if name.endswith(A)} == layers


def test_merged_sums_equal_those_of_peft() -> None:
    lm, reference = small_model(), small_model()
    frozen = {name: param.clone() for name, param in lm.named_parameters()}
    add_adapters(lm, rank=3, alpha=12.0, targets=["q_proj", "mlp.down_proj"], bf16=False)
    filled(lm)
    model = get_peft_model(reference, PeftConfig(r=3, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    trained = {exported_name(name): p.detach() for name, p in lm.named_parameters() if is_adapter(name)}
    wanted = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == wanted.keys()
    for name, param in wanted.items():
        param.data.copy_(trained[name])
    ids = torch.arange(10)[None]
    torch.testing.assert_close(lm(ids).logits, model(ids).logits)
    merged = model.merge_and_unload()
    for name, value in merged_parameters(lm):
        value = value.make() if isinstance(value, Deferred) else value
        torch.testing.assert_close(value, merged.get_parameter(name).detach(), msg=name)
    for name, value in merged_parameters(lm):  # nothing was added in place
        if not isinstance(value, Deferred):
            assert torch.equal(value, frozen[name])


def test_only_adapters_train() -> None:
    lm = small_model()
    add_adapters(lm, rank=2, bf16=True)
    for name, param in lm.named_parameters():
        assert param.requires_grad == is_adapter(name)
        assert param.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16)
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight
    assert sum(is_adapter(name) for name, _ in lm.named_parameters()) == 2 * 2 * 7


def test_adapters_start_as_in_peft() -> None:
    name = "model.layers.0.self_attn.q_proj." + A
    first = initial_value(name, torch.Size((64, 256)), seed=1)
    assert torch.equal(first, initial_value(name, torch.Size((64, 256)), seed=1))
    assert not torch.equal(first, initial_value(name, torch.Size((64, 256)), seed=2))
    layer = torch.nn.Linear(256, 64)  # kaiming_uniform_ with a = sqrt(5), which peft's A has too
    assert first.abs().max() == pytest.approx(layer.weight.abs().max().item(), rel=0.01)
    assert first.std().item() == pytest.approx(layer.weight.std().item(), rel=0.05)
    assert not initial_value(name.replace(A, B), torch.Size((8, 4)), seed=1).any()


def test_targets_are_the_ends_of_names() -> None:
    shapes = shapes_of(small_model())
    assert len(targeted(shapes, None)) == 14
    assert list(targeted(shapes, ["layers.1.self_attn.q_proj"])) == ["model.layers.1.self_attn.q_proj"]
    assert targeted(shapes, ["down_proj"])["model.layers.0.mlp.down_proj"] == (16, 32)
    with pytest.raises(ConfigError, match=r"targets=proj,embed_tokens: matches no linear layer.*self_attn.q_proj"):
        targeted(shapes, ["q_proj", "proj", "embed_tokens"])
    with pytest.raises(ConfigError, match="no matrices called layers"):
        targeted({"h.0.attn.c_attn.weight": (4, 4)}, None)
    assert shortened(shapes, list(targeted(shapes, ["mlp.up_proj"]))) == ["up_proj"]
    one = list(targeted(shapes, ["layers.1.mlp.up_proj"]))
    assert shortened(shapes, one) == one


def test_frozen_weights_cost_no_gradient() -> None:
    lm = small_model()
    flops = train_flops(
        Student(lm, objective=Objective(DistillLoss(kl_type="mixed"))), num_tokens=9, num_response_tokens=4
    )
    add_adapters(lm, rank=1, targets=["q_proj"], bf16=False)
    student = Student(lm, objective=Objective(DistillLoss(kl_type="mixed")))
    added = 6 * 2 * (16 + 16) * 9
    assert train_flops(student, num_tokens=9, num_response_tokens=4) == flops * 4 / 6 + added


def test_changed_frozen_weights_are_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model("student")
    (tmp_path / "state.json").write_text(json.dumps({"base": fingerprint(folder)}))
    student = ModelFiles.find(str(folder), key="model.student.path")
    check_base(Checkpoint(tmp_path), student)
    save_file({"w": torch.ones(3, 4)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="model.student.path=.* adapters of"):
        check_base(Checkpoint(tmp_path), student)


def test_the_engine_gets_copies() -> None:
    value = torch.ones(3)
    (given,) = whole_tensors([("w", value)]).values()
    given.mul_(2)  # as vLLM does
    assert torch.equal(value, torch.ones(3))


def test_adapter_that_misfits_engine_is_refused() -> None:
    assert ADAPTER_RANKS[-1] == MAX_ENGINE_RANK
    expected = {"model.layers.0.mlp.up_proj.weight": torch.Size((32, 16))}
    layer = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = (f"{layer}.lora_A.weight", torch.ones(4, 16)), (f"{layer}.lora_B.weight", torch.ones(32, 4))

    def check(weights: list[tuple[str, torch.Tensor]]) -> None:
        wanted = adapter_shapes(weights, rank=4, expected=expected)
        check_names_and_shapes(weights, expected=wanted, optional=set())

    check([a, b])
    for wrong, message in (
        ([a], "lora_B.weight is missing"),
        ([a, (b[0], b[1].T)], r"shape \[4, 32\], the model's files have \[32, 4\]"),
        ([(a[0].replace("up", "down"), a[1]), b], "down_proj.lora_A.weight is not in the model's files"),
        ([], "no tensors"),
    ):
        with pytest.raises(DistillError, match=message):
            check(wrong)
