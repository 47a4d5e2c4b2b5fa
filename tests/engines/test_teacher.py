from dataclasses import replace

import pytest
import torch

from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.teacher import VllmTeacher
from distill_cli.errors import ConfigError, DistillError

from .reference import MAX_LEN, VOCAB_SIZE, random_sequences, reference_logp, sampled_reference_logp

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4


def assert_scores_equal_reference(scores, model, token_ids, *, start, topk, temperature=1.0):
    logp_RV = reference_logp(model, token_ids, temperature=temperature)[start - 1 :]
    targets_R1 = torch.tensor(token_ids[start:])[:, None]
    num_response_tokens = len(token_ids) - start

    assert scores.topk_ids.shape == scores.topk_logp.shape == (num_response_tokens, topk)
    assert (scores.topk_ids.dtype, scores.topk_logp.dtype) == (torch.int32, torch.float32)
    assert (scores.sampled_logp.dtype, scores.sampled_logp.shape) == (torch.float32, (num_response_tokens,))
    torch.testing.assert_close(scores.sampled_logp, logp_RV.gather(-1, targets_R1)[:, 0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scores.topk_logp, logp_RV.topk(topk).values, atol=TOLERANCE, rtol=0)
    # By value, not by id: two candidates may be equal up to rounding.
    torch.testing.assert_close(logp_RV.gather(-1, scores.topk_ids.long()), scores.topk_logp, atol=TOLERANCE, rtol=0)


def test_scores_equal_transformers_at_ragged_lengths(scorer, teacher):
    lengths = [2, 3, 17, 128, 129, 200, MAX_LEN - 1, MAX_LEN]
    starts = [1, 2, 5, 127, 1, 150, 300, 1]
    sequences = random_sequences(lengths)
    scores = scorer.score(sequences, response_starts=starts)
    for sequence, start, result in zip(sequences, starts, scores, strict=True):
        assert_scores_equal_reference(result, teacher, sequence, start=start, topk=16)


def test_hidden_states_and_head_give_the_scores(scorer, teacher):
    """They are what transformers' head reads, at ragged lengths; the head is transformers' too."""
    sequences, starts = random_sequences([2, 3, 17, 128, 129, 200, MAX_LEN]), [1, 3, 5, 127, 1, 150, 1]
    scores, found = (scorer.score(sequences, response_starts=starts, hidden=hidden) for hidden in (False, True))
    head = scorer.head()
    torch.testing.assert_close(head.weight, teacher.get_output_embeddings().weight.detach()[: len(head.weight)])
    assert (head.bias, head.scale, head.soft_cap) == (None, 1.0, None)
    assert scorer.head((5, 9)).weight.equal(head.weight[5:9])
    for sequence, start, known, one in zip(sequences, starts, scores, found, strict=True):
        assert (one.hidden.shape[0], one.topk_ids.shape[1]) == (len(sequence) - start, 0)
        with torch.no_grad():
            states = teacher.get_decoder()(torch.tensor([sequence])).last_hidden_state[0, start - 1 : -1]
        torch.testing.assert_close(one.hidden, states, atol=TOLERANCE, rtol=0)
        logp_RV = head.logits(one.hidden).log_softmax(-1)
        got = logp_RV.gather(1, known.topk_ids.long()).float()
        torch.testing.assert_close(got, known.topk_logp, atol=TOLERANCE, rtol=0)


def test_candidates_fall_and_differ(scorer):
    (scores,) = scorer.score(random_sequences([60]), response_starts=[10])
    assert (scores.topk_logp.diff(dim=-1) <= 0).all()
    assert all(len(set(row)) == 16 for row in scores.topk_ids.tolist())


@pytest.mark.parametrize(("topk", "temperature"), [(1, 0.5), (VOCAB_SIZE, 1.7)])
def test_topk_and_temperature(process_group, teacher, teacher_settings, topk, temperature):
    scorer = VllmTeacher(teacher_settings, topk=topk, temperature=temperature)
    sequences = random_sequences([40, 90])
    # Its own answers know nothing of the temperature that it scores at.
    greedy = SamplingSettings(max_new_tokens=10, temperature=0.0, ignore_eos=True)
    for prompt, answer in zip(sequences, scorer.sample(sequences, seeds=[1, 2], sampling=greedy), strict=True):
        expected = sampled_reference_logp(teacher, prompt, answer.token_ids)
        torch.testing.assert_close(torch.tensor(answer.logp), expected, atol=TOLERANCE, rtol=0)
    for sequence, scores in zip(sequences, scorer.score(sequences, response_starts=[8, 30]), strict=True):
        start = len(sequence) - len(scores.sampled_logp)
        assert_scores_equal_reference(scores, teacher, sequence, start=start, topk=topk, temperature=temperature)
        if topk == VOCAB_SIZE:  # full support: nothing is outside
            torch.testing.assert_close(scores.topk_logp.exp().sum(-1), torch.ones(len(scores.sampled_logp)))
    scorer.close()


def test_unshared_ids_are_not_scored(process_group, teacher, teacher_settings):
    """Its vocabulary is padded beyond the student's: what is left is a distribution by itself."""
    shared = 200
    scorer = VllmTeacher(replace(teacher_settings, vocab_size=shared), topk=shared)
    sequence = [token % shared for token in random_sequences([60])[0]]
    (scores,) = scorer.score([sequence], response_starts=[10])
    assert scores.topk_ids.max() < shared
    logits = teacher(torch.tensor([sequence])).logits[0, 9:-1, :shared]
    expected = logits.log_softmax(-1).gather(1, scores.topk_ids.long())
    torch.testing.assert_close(scores.topk_logp, expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scores.topk_logp.exp().sum(-1), torch.ones(50))
    answered = scorer.sample([sequence], seeds=[1], sampling=SamplingSettings(max_new_tokens=50, ignore_eos=True))
    assert max(answered[0].token_ids) < shared
    with pytest.raises(DistillError, match="token ids outside 0 to 199"):
        scorer.score([[shared, 1]], response_starts=[1])
    scorer.close()


def test_prefill_in_chunks_changes_nothing(process_group, teacher, teacher_settings):
    pieces = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "max_num_seqs": 4}
    chunked = replace(teacher_settings, kwargs={**teacher_settings.kwargs, **pieces})
    scorer = VllmTeacher(chunked, topk=16)
    sequences = random_sequences([MAX_LEN, 47, 48, 49, 200])
    for sequence, scores in zip(sequences, scorer.score(sequences, response_starts=[1, 2, 3, 4, 100]), strict=True):
        start = len(sequence) - len(scores.sampled_logp)
        assert_scores_equal_reference(scores, teacher, sequence, start=start, topk=16)
    scorer.close()


def test_scoring_uses_no_prefix_cache(scorer, teacher):
    (prefix,) = random_sequences([260])
    sequences = [prefix + [token] * 8 for token in (5, 6, 7)]
    for _ in range(2):
        for sequence, scores in zip(sequences, scorer.score(sequences, response_starts=[1] * 3), strict=True):
            assert_scores_equal_reference(scores, teacher, sequence, start=1, topk=16)


def test_empty_responses_give_empty_tensors(scorer, teacher):
    sequences = random_sequences([1, 9, 12])
    empty, scored, also_empty = scorer.score(sequences, response_starts=[1, 4, 12])
    for scores in (empty, also_empty):
        assert scores.topk_ids.shape == scores.topk_logp.shape == (0, 16)
        assert (scores.topk_ids.dtype, scores.topk_logp.dtype) == (torch.int32, torch.float32)
        assert scores.sampled_logp.shape == (0,)
    assert_scores_equal_reference(scored, teacher, sequences[1], start=4, topk=16)
    assert scorer.score([], response_starts=[]) == []


def test_a_call_has_its_options(scorer, teacher):
    """Top-k of each sequence, temperature and vocabulary are those of the call; the next call has the teacher's own."""
    shared, topks, starts = 200, [3, 16, 1, 3], [8, 30, 2, 5]
    sequences = [[token % shared for token in ids] for ids in random_sequences([40, 90, 17, 5])]
    options = {"topk": topks, "temperature": 1.7, "vocab_size": shared}
    scored = scorer.score(sequences, response_starts=starts, **options)
    for ids, start, topk, scores in zip(sequences, starts, topks, scored, strict=True):
        logits = teacher(torch.tensor([ids])).logits[0, start - 1 : -1, :shared] / 1.7
        assert scores.topk_ids.shape == (len(ids) - start, topk)
        expected = logits.log_softmax(-1)
        torch.testing.assert_close(scores.topk_logp, expected.topk(topk).values, atol=TOLERANCE, rtol=0)
        own = expected.gather(1, torch.tensor(ids[start:])[:, None])[:, 0]
        torch.testing.assert_close(scores.sampled_logp, own, atol=TOLERANCE, rtol=0)
    sampling = SamplingSettings(max_new_tokens=50, ignore_eos=True)
    answers = [scorer.sample([[3, 4, 5], [6]], seeds=[1, 2], sampling=sampling, vocab_size=size) for size in (20, None)]
    assert max(max(sample.token_ids) for sample in answers[0]) < 20
    assert max(max(sample.token_ids) for sample in answers[1]) >= 20
    for ids, start, scores in zip(sequences, starts, scorer.score(sequences, response_starts=starts), strict=True):
        assert_scores_equal_reference(scores, teacher, ids, start=start, topk=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 17}, "topk is 17, allowed are 1 to 16"),
        ({"topk": [0]}, "topk is 0, allowed are 1 to 16"),
        ({"topk": 9, "vocab_size": 8}, "topk is 9, allowed are 1 to 8"),
        ({"vocab_size": VOCAB_SIZE + 1}, "vocab_size is 301, allowed are 1 to 300"),
        ({"topk": 1, "vocab_size": 4}, "token ids outside 0 to 3"),
        ({"temperature": 0.0}, "temperature is 0.0, must be above 0"),
    ],
)
def test_impossible_options_are_refused(scorer, options, message):
    with pytest.raises(DistillError, match=message):
        scorer.score([[3, 4]], response_starts=[1], **options)


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[3, 4]], [0], "response 0 starts at 0"),
        ([[3, 4]], [3], "response 0 starts at 3"),
        ([[3, 4], [5, VOCAB_SIZE]], [1, 1], "sequence 1 has token ids outside"),
        ([[3, -1]], [1], "sequence 0 has token ids outside"),
        ([[3] * (MAX_LEN + 1)], [1], f"sequence 0 has {MAX_LEN + 1} tokens"),
    ],
)
def test_bad_requests_are_refused(scorer, teacher, sequences, starts, message):
    with pytest.raises(DistillError, match=message):
        scorer.score(sequences, response_starts=starts)
    (good,) = random_sequences([30])
    (scores,) = scorer.score([good], response_starts=[10])
    assert_scores_equal_reference(scores, teacher, good, start=10, topk=16)


def test_the_engine_survives_a_failing_step(scorer, teacher, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("out of memory, say")

    sequences = random_sequences([30, 31, 32])
    with monkeypatch.context() as patch:
        scorer.call_worker(lambda worker: patch.setattr(worker.get_model(), "compute_logits", fail))
        with pytest.raises(DistillError, match=r"the teacher failed .*out of memory, say"):
            scorer.score(sequences, response_starts=[1, 1, 1])
    (scores,) = scorer.score(sequences[:1], response_starts=[10])
    assert_scores_equal_reference(scores, teacher, sequences[0], start=10, topk=16)


@pytest.mark.parametrize(
    ("topk", "changes", "message"),
    [
        (VOCAB_SIZE + 1, {}, "topk is 301"),
        (8, {"max_model_len": MAX_LEN + 1}, "has 320 positions"),
    ],
)
def test_impossible_settings_are_config_errors(process_group, teacher, teacher_settings, topk, changes, message):
    with pytest.raises(ConfigError, match=message):
        VllmTeacher(replace(teacher_settings, **changes), topk=topk)
