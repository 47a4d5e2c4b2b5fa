import statistics
from dataclasses import replace

import pytest
import torch

from distill_cli.engines.base import Request
from distill_cli.engines.sampler import VllmSampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import DistillError
from distill_cli.types import Sample

from .reference import (
    EOS,
    MAX_LEN,
    VOCAB_SIZE,
    make_model,
    make_tokenizer,
    random_sequences,
    reference_logp,
    sampled_reference_logp,
)

pytestmark = pytest.mark.slow

GREEDY = SamplingSettings(max_new_tokens=24, temperature=0.0, ignore_eos=True)


def assert_logp_equal_reference(samples, model, prompts):
    for sample, prompt in zip(samples, prompts, strict=True):
        expected = sampled_reference_logp(model, prompt, sample.token_ids)
        torch.testing.assert_close(torch.tensor(sample.logp), expected, atol=1e-4, rtol=0)


def greedy_reference(model, prompt, *, num_tokens):
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(model(torch.tensor([token_ids])).logits[0, -1].argmax().item())
    return token_ids[len(prompt) :]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(max_new_tokens=40),
        SamplingSettings(max_new_tokens=40, temperature=0.6, top_p=0.9, top_k=20),
        GREEDY,
    ],
)
def test_logp_is_raw_and_equals_transformers(sampler, student, sampling):
    prompts = random_sequences([1, 5, 33, 140])
    samples = sampler.sample(prompts, seeds=[1, 2, 3, 4], sampling=sampling)
    assert_logp_equal_reference(samples, student, prompts)


def test_answers_are_equal_without_logp(sampler):
    prompts, seeds = random_sequences([1, 5, 33]), [1, 2, 3]
    sampling = SamplingSettings(max_new_tokens=40)
    samples = sampler.sample(prompts, seeds=seeds, sampling=sampling)
    bare = sampler.sample(prompts, seeds=seeds, sampling=replace(sampling, logp=False))
    assert bare == [replace(sample, logp=None) for sample in samples]


def test_answers_are_reported_as_they_end(sampler):
    prompts, seeds = random_sequences([1, 5, 33, 140]), [1, 2, 3, 4]
    sampling = SamplingSettings(max_new_tokens=200, stop_token_ids=tuple(range(20)))
    ended: dict[int, tuple] = {}

    def on_end(index, sample):
        going = len(sampler.llm.llm_engine.output_processor.request_states)
        assert index not in ended
        ended[index] = (sample, going)

    samples = sampler.sample(prompts, seeds=seeds, sampling=sampling, on_end=on_end)
    assert [ended[index][0] for index in range(4)] == samples == sampler.sample(prompts, seeds=seeds, sampling=sampling)
    lengths = [len(samples[index].token_ids) for index in ended]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
    assert next(iter(ended.values()))[1] > 0  # while others were sampled

    def fail(index, sample):
        raise DistillError("the process of the teacher was killed")

    with pytest.raises(DistillError, match="^the process of the teacher was killed$"):
        sampler.sample(prompts, seeds=seeds, sampling=sampling, on_end=fail)
    assert sampler.sample(prompts, seeds=seeds, sampling=sampling) == samples


@pytest.mark.parametrize("part", [7, 1])
def test_chains_continue_at_once(sampler, student, part):
    """Answers in parts are those in one piece, however far the others are."""
    prompts = random_sequences([1, 5, 33, 140])
    limits = [24, 9, 24, 15]
    whole = [
        s.token_ids[:limit]
        for s, limit in zip(sampler.sample(prompts, seeds=range(4), sampling=GREEDY), limits, strict=True)
    ]
    parts: list[list] = [[] for _ in prompts]
    together = set()

    def request(index):
        written = [token for one in parts[index] for token in one.token_ids]
        left = min(part, limits[index] - len(written))
        return Request(prompts[index] + written, 10 * index + len(written), left) if left else None

    def then(index, sample):
        parts[index].append(sample)
        together.add(len(sampler.llm.llm_engine.output_processor.request_states))
        return request(index)

    sampler.sample_chains([request(index) for index in range(4)], sampling=GREEDY, then=then)
    assert [[token for one in own for token in one.token_ids] for own in parts] == whole
    assert {one.finish_reason for own in parts for one in own} == {"length"}
    assert max(together) > 1
    joined = [
        Sample(ids, [x for one in own for x in one.logp], "length") for ids, own in zip(whole, parts, strict=True)
    ]
    assert_logp_equal_reference(joined, student, prompts)


def test_a_failing_chain_leaves_the_sampler_usable(sampler):
    prompts = random_sequences([4, 9])
    before = sampler.sample(prompts, seeds=[0, 0], sampling=GREEDY)
    first = [Request(ids, 0, 3) for ids in prompts]
    for wrong, message in (([], "has 0 tokens"), ([VOCAB_SIZE], "outside 0 to")):
        with pytest.raises(DistillError, match=message):
            sampler.sample_chains(first, sampling=GREEDY, then=lambda index, sample, ids=wrong: Request(ids, 0))
    assert sampler.sample(prompts, seeds=[0, 0], sampling=GREEDY) == before


def test_greedy_equals_transformers_argmax(sampler, student):
    prompts = random_sequences([4, 9])
    samples = sampler.sample(prompts, seeds=[0, 0], sampling=GREEDY)
    assert [s.token_ids for s in samples] == [greedy_reference(student, p, num_tokens=24) for p in prompts]
    only_best = SamplingSettings(max_new_tokens=24, top_k=1, ignore_eos=True)
    assert [s.token_ids for s in sampler.sample(prompts, seeds=[7, 8], sampling=only_best)] == [
        s.token_ids for s in samples
    ]


def test_a_seed_determines_the_answer(sampler):
    prompts = random_sequences([3, 7, 20, 3])
    seeds = [11, 12, 13, 2**40 + 11]
    sampling = SamplingSettings(max_new_tokens=30, ignore_eos=True)
    samples = sampler.sample(prompts, seeds=seeds, sampling=sampling)
    assert sampler.sample(prompts, seeds=seeds, sampling=sampling) == samples
    backwards = sampler.sample(prompts[::-1], seeds=seeds[::-1], sampling=sampling)
    alone = [sampler.sample([p], seeds=[s], sampling=sampling)[0] for p, s in zip(prompts, seeds, strict=True)]
    for other in (backwards[::-1], alone):
        assert [s.token_ids for s in other] == [s.token_ids for s in samples]


def test_prompts_beyond_one_pass(sampler):
    budget = sampler.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    prompts = random_sequences([300] * (budget // 300 + 3))
    sampling = SamplingSettings(max_new_tokens=8)
    samples = sampler.sample(prompts, seeds=range(len(prompts)), sampling=sampling)
    for index in (0, len(prompts) // 2, budget // 300, len(prompts) - 1):
        alone = sampler.sample([prompts[index]], seeds=[index], sampling=sampling)
        assert alone[0].token_ids == samples[index].token_ids


def test_seeds_sample_independently(sampler, student):
    """The mean of -log p over seeds is the entropy, up to chance, for small neighbours and for seeds above 32 bits."""
    (prompt,) = random_sequences([12])
    logp_V = reference_logp(student, [*prompt, 0])[-1]
    entropy = -(logp_V.exp() * logp_V).sum().item()
    for seeds in (range(500), range(2**40, 2**40 + 500 * 2**32, 2**32)):
        samples = sampler.sample([prompt] * 500, seeds=seeds, sampling=SamplingSettings(max_new_tokens=1))
        surprisal = [-sample.logp[0] for sample in samples]
        error = statistics.stdev(surprisal) / 500**0.5
        assert abs(statistics.mean(surprisal) - entropy) < 4 * error


def test_stop_tokens_end_a_response(sampler, student):
    (prompt,) = random_sequences([6])
    response = greedy_reference(student, prompt, num_tokens=24)
    stop = response[5]
    sampling = SamplingSettings(max_new_tokens=24, temperature=0.0, stop_token_ids=(stop,))
    (sample,) = sampler.sample([prompt], seeds=[0], sampling=sampling)
    assert sample.token_ids == response[: response.index(stop) + 1]
    assert len(sample.logp) == len(sample.token_ids)
    assert sample.finish_reason == "stop"


def test_a_stop_string_ends_a_response(process_group, tmp_path, settings):
    model = make_model(tmp_path, hidden_size=64, seed=5)
    make_tokenizer(tmp_path)
    sampler = VllmSampler(replace(settings, path=str(tmp_path), kwargs={}))
    (prompt,) = random_sequences([6])
    response = greedy_reference(model, prompt, num_tokens=24)
    stop = SamplingSettings(max_new_tokens=24, temperature=0.0, ignore_eos=True, stop=(f"<{response[5]}>",))
    (sample,) = sampler.sample([prompt], seeds=[0], sampling=stop)
    assert sample.token_ids == response[: response.index(response[5]) + 1]
    assert len(sample.logp) == len(sample.token_ids)
    assert sample.finish_reason == "stop"
    sampler.close()


def test_end_of_sequence_ends_a_response(sampler):
    prompts = random_sequences([3] * 16)
    samples = sampler.sample(prompts, seeds=range(16), sampling=SamplingSettings(max_new_tokens=100))
    stopped = [sample for sample in samples if sample.finish_reason == "stop"]
    assert stopped
    assert all(sample.token_ids.index(EOS) == len(sample.token_ids) - 1 for sample in stopped)
    assert all(EOS not in sample.token_ids for sample in samples if sample not in stopped)


def test_a_response_ends_at_limits(sampler):
    prompts = random_sequences([10, MAX_LEN - 4, MAX_LEN - 1])
    sampling = SamplingSettings(max_new_tokens=20, ignore_eos=True)
    samples = sampler.sample(prompts, seeds=[1, 2, 3], sampling=sampling)
    assert [len(sample.token_ids) for sample in samples] == [20, 4, 1]
    assert {sample.finish_reason for sample in samples} == {"length"}


@pytest.mark.parametrize(
    ("prompts", "seeds", "sampling", "message"),
    [
        ([[3], []], [1, 2], GREEDY, "sequence 1 has 0 tokens"),
        ([[3] * MAX_LEN], [1], GREEDY, f"sequence 0 has {MAX_LEN} tokens"),
        ([[3], [VOCAB_SIZE]], [1, 2], GREEDY, "sequence 1 has token ids outside"),
        ([[3]], [1], SamplingSettings(max_new_tokens=0), "max_tokens"),
        ([[3]], [1], SamplingSettings(max_new_tokens=4, temperature=-1.0), "temperature"),
        ([[3]], [1], SamplingSettings(max_new_tokens=4, top_p=1.5), "top_p"),
        ([[3]], [1], SamplingSettings(max_new_tokens=4, stop=("end",)), "cannot stop at strings"),
        ([[3], [4]], [1, 2], SamplingSettings(max_new_tokens=4, stop_token_ids=(VOCAB_SIZE,)), "stop_token_ids"),
    ],
)
def test_bad_requests_are_refused(sampler, student, prompts, seeds, sampling, message):
    with pytest.raises(DistillError, match=message):
        sampler.sample(prompts, seeds=seeds, sampling=sampling)
    (prompt,) = random_sequences([5])
    (sample,) = sampler.sample([prompt], seeds=[0], sampling=GREEDY)
    assert sample.token_ids == greedy_reference(student, prompt, num_tokens=24)


@pytest.mark.parametrize("where", ["the model", "the sampling of tokens"])
def test_the_engine_survives_a_failing_step(sampler, student, monkeypatch, where):
    calls = 0

    def fail_at_third(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory, say")
        return original(*args, **kwargs)

    def break_worker(worker):
        nonlocal original
        broken = worker.get_model() if where == "the model" else worker.model_runner.sampler
        name = "compute_logits" if where == "the model" else "sample"
        original = getattr(broken, name)
        patch.setattr(broken, name, fail_at_third)

    original = None
    prompts = random_sequences([4, 150, 30])
    with monkeypatch.context() as patch:
        sampler.call_worker(break_worker)
        with pytest.raises(DistillError, match=r"the sampler failed .*out of memory, say"):
            sampler.sample(prompts, seeds=[1, 2, 3], sampling=GREEDY)
    samples = sampler.sample(prompts, seeds=[1, 2, 3], sampling=GREEDY)
    assert_logp_equal_reference(samples, student, prompts)
    assert samples[0].token_ids == greedy_reference(student, prompts[0], num_tokens=24)


def test_a_missing_model_is_named(process_group, tmp_path, settings):
    with pytest.raises(DistillError, match=f"the sampler could not load {tmp_path}/absent: there is no such folder"):
        VllmSampler(replace(settings, path=str(tmp_path / "absent")))
    with pytest.raises(DistillError, match=f"the sampler could not load {tmp_path}: .*config.json") as info:
        VllmSampler(replace(settings, path=str(tmp_path)))
    assert "\n" not in str(info.value)
