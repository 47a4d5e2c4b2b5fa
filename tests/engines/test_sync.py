import copy
import gc
from dataclasses import replace

import psutil
import pytest
import torch

from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.weight_sync import check_names_and_shapes
from distill_cli.errors import DistillError, Unrecoverable

from .reference import make_model, random_sequences, sampled_reference_logp

pytestmark = pytest.mark.slow

SAMPLING = SamplingSettings(max_new_tokens=12, ignore_eos=True)


def error_of_logp(sampler, model, prompts):
    """Largest difference between the sampler's log-probabilities and the model's."""
    samples = sampler.sample(prompts, seeds=range(len(prompts)), sampling=SAMPLING)
    return max(
        (torch.tensor(sample.logp) - sampled_reference_logp(model, prompt, sample.token_ids)).abs().max().item()
        for sample, prompt in zip(samples, prompts, strict=True)
    )


def test_sync_replaces_weights_and_clears_prefixes(sampler, student, changed_student):
    prompts = random_sequences([300, 4])  # two blocks of the first would come from the prefix cache
    assert error_of_logp(sampler, student, prompts) < 1e-4
    assert error_of_logp(sampler, changed_student, prompts) > 0.1
    sampler.sync(changed_student.named_parameters(), version=7)
    assert sampler.version == 7
    assert error_of_logp(sampler, changed_student, prompts) < 1e-4
    sampler.sync(student.named_parameters(), version=8)
    assert error_of_logp(sampler, student, prompts) < 1e-4


def test_float32_weights_reach_a_bfloat16_sampler(process_group, tmp_path, settings):
    model = make_model(tmp_path, hidden_size=64, seed=4, tied=False)
    sampler = VllmSampler(replace(settings, path=str(tmp_path), dtype="bfloat16"))
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)
    prompts = random_sequences([40, 4])
    rounded = copy.deepcopy(model).bfloat16()
    assert error_of_logp(sampler, rounded, prompts) > 1
    sampler.sync(model.named_parameters(), version=1)
    assert error_of_logp(sampler, rounded, prompts) < 0.2
    sampler.close()


def without(weights, name):
    return {key: tensor for key, tensor in weights.items() if key != name}


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {**weights, "model.extra": torch.zeros(2)}, "model.extra is not in the model's files"),
        (lambda weights: without(weights, NORM), f"{NORM} is missing"),
        (lambda weights: {**weights, QUERY: weights[QUERY][:-1]}, f"{QUERY} has shape .127, 128., the model's files"),
    ],
)
def test_wrong_weights_are_refused(sampler, student, changed_student, change, message):
    prompts = random_sequences([20])
    with pytest.raises(DistillError, match=message):
        sampler.sync(change(dict(changed_student.named_parameters())).items(), version=9)
    assert sampler.version != 9
    assert error_of_logp(sampler, student, prompts) < 1e-4
    sampler.sync(changed_student.named_parameters(), version=9)
    assert error_of_logp(sampler, changed_student, prompts) < 1e-4


def test_check_of_names_and_shapes():
    expected = {"a": torch.Size([2]), "b": torch.Size([3])}
    a, b = ("a", torch.zeros(2)), ("b", torch.zeros(3))
    check_names_and_shapes([a, b], expected=expected, optional=set())
    check_names_and_shapes([a], expected=expected, optional={"b"})
    with pytest.raises(DistillError, match="twice"):
        check_names_and_shapes([a, b, b], expected=expected, optional=set())
    with pytest.raises(DistillError, match="b is missing"):
        check_names_and_shapes([a], expected=expected, optional=set())


def test_first_sync_is_compared(process_group, student, changed_student, student_settings):
    """A changed weight under version 0, then a weight that no sync brings."""
    sampler = VllmSampler(student_settings)
    with pytest.raises(Unrecoverable, match=r"a sync changes \d+ of the engine's tensors, such as "):
        sampler.sync(changed_student.named_parameters(), version=0)
    sampler.close()
    lost = "model.layers.1.input_layernorm.weight"
    sampler = VllmSampler(replace(student_settings, untouched=(lost,)))
    with pytest.raises(Unrecoverable, match=f"does not bring 1 of the engine's tensors, such as {lost}"):
        sampler.sync(without(dict(student.named_parameters()), lost).items(), version=3)
    with pytest.raises(DistillError, match="build it again"):
        sampler.sample(random_sequences([5]), seeds=[1], sampling=SAMPLING)
    sampler.close()


def test_twenty_syncs_hold_no_memory(sampler, student):
    def resident_mib():
        gc.collect()
        return psutil.Process().memory_info().rss / 2**20

    weights = list(student.named_parameters())
    for _ in range(3):
        sampler.sync(weights, version=0)
    before = resident_mib()
    for _ in range(20):
        sampler.sync(weights, version=0)
    size_mib = sum(tensor.nbytes for _, tensor in weights) / 2**20
    assert resident_mib() - before < 5 * size_mib


def test_a_sampler_needs_weights_after_sleep(process_group, student, student_settings):
    sampler = VllmSampler(replace(student_settings, sleep_mode=True))
    prompts = random_sequences([5])
    sampler.sleep()
    sampler.sleep()
    with pytest.raises(DistillError, match=r"asleep: wake\(\)"):
        sampler.sample(prompts, seeds=[1], sampling=SAMPLING)
    with pytest.raises(DistillError, match=r"asleep: wake\(\)"):
        sampler.sync(student.named_parameters(), version=1)
    sampler.wake()
    assert sampler.version == -1
    with pytest.raises(DistillError, match=r"sync\(\) comes before"):
        sampler.sample(prompts, seeds=[1], sampling=SAMPLING)
    sampler.sync(student.named_parameters(), version=1)
    assert error_of_logp(sampler, student, prompts) < 1e-4
    sampler.close()


def test_a_failed_sync_ends_the_engine(process_group, student, student_settings):
    class Lost(torch.Tensor):
        """A parameter that cannot be read, as when a rank is gone."""

        def detach(self):
            raise RuntimeError("connection closed by peer")

    sampler = VllmSampler(student_settings)
    weights = dict(student.named_parameters())
    weights[QUERY] = weights[QUERY].as_subclass(Lost)
    with pytest.raises(DistillError, match=r"sync of version 1 .*connection closed by peer"):
        sampler.sync(weights.items(), version=1)
    with pytest.raises(DistillError, match="build it again"):
        sampler.sample(random_sequences([5]), seeds=[1], sampling=SAMPLING)
    sampler.close()


def test_sleep_does_nothing_without_sleep_mode(sampler, student):
    sampler.sleep()
    assert error_of_logp(sampler, student, random_sequences([5])) < 1e-4
    sampler.wake()
