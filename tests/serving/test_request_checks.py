"""Every request that an engine cannot answer is refused with one sentence."""

from dataclasses import replace

import pytest

from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import BadBody, SampleRequest, ScoreRequest
from distill_cli.serving.request_checks import check_sample, check_score

INFO = ServerInfo(
    version="1",
    path="m",
    revision=None,
    digest="d",
    dtype="float32",
    quantization=None,
    vocab_size=100,
    eos_ids=(2,),
    max_model_len=8,
    max_topk=16,
    chat_template=None,
    special_tokens={},
    num_engines=1,
    max_queued_tokens=20,
    max_answer_bytes=400,
)


def scored(sequences: object = ((1, 2, 3),), starts: object = (1,), **options: object) -> ScoreRequest:
    return ScoreRequest.of(sequences, starts, **{"topk": 4, "temperature": 1.0, **options})


def sampled(prompts: object = ((1, 2, 3),), seeds: object = (1,), **changes: object) -> SampleRequest:
    return SampleRequest.of(prompts, seeds, sampling=SamplingSettings(**{"max_new_tokens": 3, **changes}))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (scored(topk=-1), "topk is -1, allowed are 1 to 16, and 0 for hidden states"),
        (scored(topk=17), "topk is 17, this server allows 1 to 16; start it with --max-topk 17"),
        (scored(topk=101), "topk is 101, allowed are 1 to 16"),
        (scored(topk=5, vocab_size=4), "topk is 5, allowed are 1 to vocab_size=4"),
        (scored(temperature=0.0), "temperature is 0.0, must be above 0"),
        (scored(temperature=float("nan")), "temperature is nan"),
        (scored(temperature=float("inf")), "temperature is inf"),
        (scored(vocab_size=101), "vocab_size is 101, allowed are 1 to 100"),
        (scored(vocab_size=0), "vocab_size is 0, allowed are 1 to 100"),
        (scored([], []), "lengths is empty"),
        (scored([[1], []], [1, 1]), "sequence 1 has 0 tokens, allowed are 1 to 8"),
        (scored([[1] * 9]), "sequence 0 has 9 tokens, allowed are 1 to 8"),
        (scored([[1, 2], [3, -1]], [1, 1]), "sequence 1 has token id -1, allowed are 0 to 99"),
        (scored([[1], [100]], [1, 1]), "sequence 1 has token id 100, allowed are 0 to 99"),
        (scored([[1, 50]], vocab_size=50), "sequence 0 has token id 50, allowed are 0 to 49"),
        (scored(starts=[0]), "response 0 starts at 0 in a sequence of 3 tokens, allowed are 1 to 3"),
        (scored(starts=[4]), "response 0 starts at 4 in a sequence of 3 tokens, allowed are 1 to 3"),
        (scored(starts=[1, 1]), "response_starts has 2 entries, lengths has 1"),
        (replace(scored(), lengths=scored([[1, 2]]).lengths), "lengths add up to 2, token_ids has 3 entries"),
        (scored([[1] * 7] * 3, [7] * 3), "the sequences have 21 tokens, the limit is 20; .* --max-queued-tokens"),
        (scored([[1] * 8], topk=16), "the answer would have 924 bytes, the limit is 400"),
    ],
)
def test_bad_sequences_are_refused(request_: ScoreRequest, message: str) -> None:
    with pytest.raises(BadBody, match=f"^{message}") as caught:
        check_score(request_, INFO)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (sampled([[1] * 8]), "sequence 0 has 8 tokens, allowed are 1 to 7"),
        (sampled(seeds=[1, 2]), "seeds has 2 entries, lengths has 1"),
        (sampled([[1]] * 3, [1] * 3, max_new_tokens=99), "prompts and answers may have 24 tokens, the limit is 20"),
        (sampled(max_new_tokens=0), "sampling.max_new_tokens is 0, must be at least 1"),
        (sampled(temperature=-1.0), "sampling.temperature is -1.0"),
        (sampled(top_p=0.0), "sampling.top_p is 0.0"),
        (sampled(top_p=1.5), "sampling.top_p is 1.5"),
        (sampled(top_k=-1), "sampling.top_k is -1, must be from 0 to 100"),
        (sampled(stop=("",)), r"sampling.stop is \('',\)"),
        (sampled(stop_token_ids=(100,)), "sampling.stop_token_ids has ids outside 0 to 99"),
    ],
)
def test_bad_sampling_is_refused(request_: SampleRequest, message: str) -> None:
    with pytest.raises(BadBody, match=f"^{message}"):
        check_sample(request_, INFO)


def test_the_largest_requests_pass() -> None:
    check_score(scored([[99] * 8, [0], [1] * 8], [8, 1, 3], topk=9), INFO)
    check_score(scored([[1, 49]], topk=16, vocab_size=50, temperature=1e-3), INFO)
    check_sample(sampled([[99] * 7, [0]], [-1, 2**60], max_new_tokens=10**6, stop=("x",), stop_token_ids=(99,)), INFO)
