"""Families that need more than vLLM does by itself: real engines of tiny models against transformers."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Olmo2Config, Olmo2Model
from transformers.utils import is_torchvision_available

from distill_cli.engines.cpu_mamba import selective_scan, update_states
from distill_cli.engines.engine import VllmEngine
from distill_cli.engines.family_settings import supplied_fields
from distill_cli.engines.process_setup import placeholder_torchvision
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.teacher import VllmTeacher

from .reference import EOS, MAX_LEN, VOCAB_SIZE, random_sequences, reference_logp, sampled_reference_logp

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}


def make(config, folder):
    """A random model in float32, saved to the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model.save_pretrained(folder)
    return model


def check_samples(engine, model):
    """Sampled log-probabilities are transformers', of several requests at once."""
    prompts = random_sequences([3, 70, 20])
    samples = engine.sample(prompts, seeds=[1, 2, 3], sampling=SamplingSettings(max_new_tokens=8))
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = sampled_reference_logp(model, prompt, sample.token_ids)
        assert torch.tensor(sample.logp) == pytest.approx(expected, abs=1e-5)


@pytest.mark.exhaustive
def test_engines_leave_transformers_classes_alone(process_group, settings, tmp_path):
    """vLLM runs olmo2 with transformers' own class, which it decorates."""
    config = Olmo2Config(**SIZES)
    before, (token_ids,) = make(config, tmp_path), random_sequences([40])
    expected = reference_logp(before, token_ids)
    bases, attributes = Olmo2Model.__bases__, dict(vars(Olmo2Model))
    for _ in range(2):
        engine = VllmEngine(replace(settings, path=str(tmp_path)))
        after = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        check_samples(engine, before)
        for model in (before, after):
            assert torch.equal(reference_logp(model, token_ids), expected)
        engine.close()
    assert Olmo2Model.__bases__ == bases
    assert vars(Olmo2Model).items() >= attributes.items()
    assert "__call__" not in vars(Olmo2Model)


CONFIGS = {
    # the gated delta rule in float32; experts, after an engine of a dense model
    "qwen3_next": {
        "head_dim": 32,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    # fields of config.json that vLLM misses; queries of three dimensions
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    # Mamba's first kind
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_dt_rank": 8},
    # a multimodal model, without its processor
    "gemma3": {
        "text_config": SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32},
        "vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    },
}


@pytest.mark.parametrize("family", CONFIGS)
def test_family_matches_transformers(family, process_group, settings, tmp_path):
    model = make(CONFIG_MAPPING[family](**SIZES | {"initializer_range": 0.05} | CONFIGS[family]), tmp_path)
    teacher = VllmTeacher(replace(settings, path=str(tmp_path)), topk=4)
    sequences = random_sequences([90, 2, 64, 7])
    scores = teacher.score(sequences, response_starts=[1] * len(sequences))
    for token_ids, score in zip(sequences, scores, strict=True):
        expected = reference_logp(model, token_ids).gather(-1, score.topk_ids.long())
        torch.testing.assert_close(score.topk_logp, expected, atol=1e-5, rtol=0)
    check_samples(teacher, model)
    teacher.close()


def test_placeholder_torchvision_goes_again():
    with placeholder_torchvision():
        import torchvision.transforms.v2.functional as functional
        from torchvision.transforms import InterpolationMode

        assert InterpolationMode.BICUBIC | None
        assert functional.resize
    assert importlib.util.find_spec("torchvision") is None
    assert not [name for name in sys.modules if name.startswith("torchvision.")]
    assert not is_torchvision_available()


def test_only_missing_fields_are_supplied():
    assert supplied_fields({"model_type": "lfm2", "hidden_size": 8}) == {"conv_dim": 8, "block_dim": 8}
    assert supplied_fields({"model_type": "lfm2", "hidden_size": 8, "conv_dim": 8}) == {"block_dim": 8}
    assert supplied_fields({"model_type": "qwen3", "hidden_size": 8}) == {}
    assert supplied_fields({"architectures": ["PhimoeForCausalLM"]}) == {"architectures": ["PhiMoEForCausalLM"]}


def test_mamba_scan_in_two_steps():
    """A scan over two sequences equals a scan over their beginnings and one step more."""
    generator, starts = torch.Generator().manual_seed(0), torch.tensor([0, 5, 8])

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tokens, (u, delta, gate), (b, c) = 8, random(3, 6, 8), random(2, 4, 8)
    decay, skip, bias, slots = -random(6, 4).exp(), random(6), random(6), torch.tensor([2, 1])
    states = torch.full((3, 6, 4), torch.nan)
    whole = selective_scan(
        *(u, states, delta, decay, b, c, skip, gate, bias),
        cache_indices=slots,
        has_initial_state=torch.tensor([False, False]),
        query_start_loc=starts,
    )
    last, ends = torch.tensor([4, 7]), states[slots]
    first = torch.tensor([row for row in range(tokens) if row not in last])
    selective_scan(
        *(u[:, first], states, delta[:, first], decay, b[:, first], c[:, first], skip, gate[:, first], bias),
        cache_indices=slots,
        has_initial_state=torch.tensor([False, False]),
        query_start_loc=torch.tensor([0, 4, 6]),
    )
    out = torch.empty(2, 6)
    update_states(
        *(states, u[:, last].T, delta[:, last].T, decay, b[:, last].T, c[:, last].T, skip, bias),
        z=gate[:, last].T,
        state_batch_indices=slots,
        out=out,
    )
    torch.testing.assert_close(out.T, whole[:, last])
    torch.testing.assert_close(states[slots], ends)
