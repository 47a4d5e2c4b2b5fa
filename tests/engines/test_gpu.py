"""What only a GPU shows. Not run so far."""

from dataclasses import replace

import pytest
import torch

from distill_cli.engines.sampler import Sampler, SamplingSettings

from .reference import random_sequences, sampled_reference_logp

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_sleeping_sampler_gives_memory_back_and_a_sync_brings_its_weights(process_group, student, student_settings):
    settings = replace(student_settings, sleep_mode=True, kv_cache_bytes=1 << 30, enforce_eager=True)
    sampler = Sampler(settings)
    free_awake, _ = torch.cuda.mem_get_info()
    sampler.sleep()
    free_asleep, _ = torch.cuda.mem_get_info()
    assert free_asleep - free_awake > 0.9 * settings.kv_cache_bytes
    sampler.wake()
    sampler.sync([(name, tensor.cuda()) for name, tensor in student.named_parameters()], version=1)
    prompts = random_sequences([5, 200])
    samples = sampler.sample(prompts, seeds=[1, 2], sampling=SamplingSettings(max_new_tokens=20))
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = sampled_reference_logp(student, prompt, sample.token_ids)
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-2, rtol=0)
    sampler.close()
