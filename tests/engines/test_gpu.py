"""What only a GPU shows. Not run so far."""

import copy
from dataclasses import replace

import pytest
import torch

from distill_cli.engines.companion import CompanionTeacher
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.vllm_patches import pooled_bytes
from distill_cli.errors import DistillError

from .reference import random_sequences, sampled_reference_logp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_sleeping_sampler_frees_memory(process_group, student, student_settings):
    settings = replace(student_settings, sleep_mode=True, kv_cache_bytes=1 << 30)  # with CUDA graphs, as runs have it
    sampler, trained = VllmSampler(settings), copy.deepcopy(student)
    prompts = random_sequences([5, 200])
    for version in (1, 2):
        free_awake, _ = torch.cuda.mem_get_info()
        sampler.sleep()
        free_asleep, _ = torch.cuda.mem_get_info()
        assert free_asleep - free_awake > 0.9 * settings.kv_cache_bytes
        assert settings.kv_cache_bytes < pooled_bytes() <= torch.cuda.memory_reserved()  # though it is not there
        sampler.wake()
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
        sampler.sync([(name, tensor.cuda()) for name, tensor in trained.named_parameters()], version=version)
        samples = sampler.sample(prompts, seeds=[1, 2], sampling=SamplingSettings(max_new_tokens=20))
        for prompt, sample in zip(prompts, samples, strict=True):
            expected = sampled_reference_logp(trained, prompt, sample.token_ids)
            torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-2, rtol=0)
    sampler.sleep()
    sampler.close()  # asleep, as at the end of a run


def test_a_sleeping_companion_frees_memory(process_group, teacher_settings):
    settings = replace(teacher_settings, sleep_mode=True, kv_cache_bytes=1 << 30, enforce_eager=True)
    scorer = CompanionTeacher(settings, topk=8)
    sequences = random_sequences([60, 200])
    before = scorer.score(sequences, response_starts=[20, 100])
    free_awake, _ = torch.cuda.mem_get_info()
    scorer.sleep()
    free_asleep, _ = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.9 * settings.kv_cache_bytes
    with pytest.raises(DistillError, match=r"asleep: wake\(\)"):
        scorer.score(sequences, response_starts=[20, 100])
    scorer.wake()
    for ours, theirs in zip(scorer.score(sequences, response_starts=[20, 100]), before, strict=True):
        torch.testing.assert_close(ours.topk_logp, theirs.topk_logp, atol=1e-3, rtol=0)
    scorer.close()
