"""Syncs of families that vLLM stores otherwise than their files: experts, sinks, renamed and shared parameters."""

import json
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import EngineSettings, SamplingSettings
from distill_cli.student.model import build_lm
from distill_cli.student.weights import load_weights
from tests.families import make_model, save_model

pytestmark = pytest.mark.slow

PROMPTS = [list(range(5, 5 + n)) for n in (7, 50)]
SAMPLING = SamplingSettings(max_new_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "gemma3", "qwen3_5_text"])
@pytest.mark.exhaustive
def test_engine_follows_its_student(process_group, family: str, tmp_path: Path) -> None:
    reference = make_model(family)
    save_model(reference, tmp_path)
    check_sync(reference, tmp_path)


def test_a_model_that_is_stored_twice(process_group, tmp_path: Path) -> None:
    """The tied head beside the embedding, and all of it in Mistral's own format (of which only the names count)."""
    reference = make_model("gemma")
    save_model(reference, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in state
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(head, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    places = dict.fromkeys(state, "model-00001-of-00002.safetensors") | dict.fromkeys(
        head, "model-00002-of-00002.safetensors"
    )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "params.json").write_text("{}")
    check_sync(reference, tmp_path)


def check_sync(reference: PreTrainedModel, folder: Path) -> None:
    lm, published = build_lm(folder)
    settings = EngineSettings(str(folder), max_model_len=96, dtype="float32", untouched=published.untouched)
    sampler = VllmSampler(settings)
    load_weights(lm, published, device=torch.device("cpu"))

    def difference() -> float:
        samples = sampler.sample(PROMPTS, seeds=[1, 2], sampling=SAMPLING)
        worst = 0.0
        for prompt, sample in zip(PROMPTS, samples, strict=True):
            with torch.no_grad():
                logits = reference(torch.tensor([prompt + sample.token_ids]), use_cache=False).logits
            logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])
            worst = max(worst, float((logp[:, 0] - torch.tensor(sample.logp)).abs().max()))
        return worst

    def sync(version: int) -> None:
        sampler.sync(published.weights(chain(lm.named_parameters(), lm.named_buffers())), version=version)

    sync(0)  # compares every tensor
    assert difference() < 1e-4
    params, generator = dict(reference.named_parameters()), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in lm.named_parameters():
            param.mul_(1 + 0.2 * torch.randn(param.shape, generator=generator))
            params[name].copy_(param)
    assert difference() > 0.1
    sync(1)
    assert difference() < 1e-4
    sampler.close()
