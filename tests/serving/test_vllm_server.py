"""A real server of vLLM on loopback as a teacher, from the client to a run. The last tests end the server."""

import shutil
import socket

from distill_cli.engines.process_setup import prepare_process

prepare_process()  # before torch

import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from distill_cli.engines import handshake  # noqa: E402
from distill_cli.engines.handshake import answers, make_probe  # noqa: E402
from distill_cli.engines.settings import EngineSettings, SamplingSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402
from distill_cli.engines.vllm_server import VllmServerTeacher  # noqa: E402
from distill_cli.errors import ConfigError, DistillError, TeacherLost  # noqa: E402
from tests.end_to_end.conftest import distill, refused  # noqa: E402
from tests.engines.conftest import group_of_one  # noqa: E402

from . import running  # noqa: E402
from .test_server import random_sequences  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

VOCAB_SIZE, MAX_LEN, MAX_TOPK, TOPK = 512, 500, 48, 16
RUN = (
    *("train.max_steps=3", "rollout.prompts_per_step=8", "train.global_batch_size=4", "train.micro_batch_tokens=128"),
    *("loss.kl_weight=0.3", f"loss.topk={TOPK}", "rollout.max_new_tokens=30", "cluster.ranks_per_node=1"),
    *("eval.period=0", "eval.at_start=false", "eval.at_end=false", "tracker=none"),
)


@pytest.fixture(scope="module")
def server():
    limits = f"--max-model-len={MAX_LEN}", f"--max-logprobs={MAX_TOPK}", "--no-enable-chunked-prefill"
    started = running.start_vllm(*limits)
    yield started
    end(started)


@pytest.fixture(scope="module")
def teacher(server, tmp_path_factory):
    """The same teacher in this process, which is built while the server starts."""
    settings = EngineSettings(str(running.folder()), max_model_len=MAX_LEN, dtype="float32", kv_cache_bytes=64 << 20)
    with group_of_one(tmp_path_factory.mktemp("store")):
        teacher = VllmTeacher(settings, topk=TOPK)
        server.wait_ready()
        yield teacher
        teacher.close()


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.delenv("DISTILL_SERVER_TOKEN", raising=False)
    monkeypatch.setenv("VLLM_API_KEY", running.TOKEN)


@pytest.fixture
def client(server, teacher):
    """Make clients of the server with the options of a call."""
    made = []

    def make(*more, **options):
        made.append(VllmServerTeacher([*more, server.address], **{"topk": TOPK, "patience_s": 60.0, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def refusals(server, teacher, tmp_path, monkeypatch, capsys):
    def refuse(*overrides):
        url = f"model.teacher.url={server.address}"
        return "\n".join(refused(tmp_path, monkeypatch, capsys, *RUN, url, *overrides))

    return refuse


def end(server):
    """Kill the server and its engine, which a killed server leaves behind."""
    processes = [*server.engines, server.process] if psutil.pid_exists(server.process.pid) else []
    for process in processes:
        process.kill()
    server.process.wait(60)


def assert_close(ours, theirs, *, atol):
    for scores, other in zip(ours, theirs, strict=True):
        assert scores.topk_ids.dtype is torch.int32
        torch.testing.assert_close(scores.topk_logp, other.topk_logp, atol=atol, rtol=0)
        torch.testing.assert_close(scores.sampled_logp, other.sampled_logp, atol=atol, rtol=0)
        is_clear = other.topk_logp.diff(dim=-1).abs().amin(-1) > 2 * atol
        assert torch.equal(scores.topk_ids[is_clear], other.topk_ids[is_clear])


def test_scores_equal_in_process(client, teacher):
    """Up to the last bits: engines in this process have another kernel for norms, `normalize_in_one_call`.

    Tokens that the teacher takes for impossible, the last of the top-k and all after random ones, have larger logits.
    """
    there = client()
    prompts = probe_texts()
    answered = teacher.sample(prompts, seeds=range(8), sampling=SamplingSettings(max_new_tokens=60))
    sequences = [prompt + one.token_ids for prompt, one in zip(prompts, answered, strict=True)]
    starts = [len(prompt) for prompt in prompts]
    ours, theirs = assert_equal_scores(there, teacher, sequences, starts, atol=3e-5)
    for scores, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(scores.sampled_logp, other.sampled_logp, atol=1e-5, rtol=0)
    sequences = random_sequences([5, 40, MAX_LEN - 1, 2, 60, 7, *[300] * 12])
    assert_equal_scores(there, teacher, sequences, [1, 25, 400, 1, 60, 3, *range(1, 289, 24)], atol=1e-4)
    assert there.score([], response_starts=[]) == []
    with pytest.raises(DistillError, match="response 0 starts at 0"):
        there.score([[3]], response_starts=[0])


def probe_texts():
    """Questions as the teacher reads them."""
    tokenizer = Tokenizer.from_file(str(running.folder() / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is {} + {}?<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(text.format(17 + 5 * number, 90 - number)).ids for number in range(8)]


def assert_equal_scores(there, here, sequences, starts, *, atol):
    ours, theirs = (one.score(sequences, response_starts=starts) for one in (there, here))
    assert_close(ours, theirs, atol=atol)
    return ours, theirs


def test_cached_prefixes_are_scored(client):
    """vLLM keeps prefixes; a prompt whose log-probabilities are asked for must not begin with one of them."""
    there, sequences = client(), random_sequences([300], seed=5) * 3
    there.sample([ids[:260] for ids in sequences], seeds=[1, 2, 3], sampling=SamplingSettings(max_new_tokens=2))
    first, *others = there.score(sequences, response_starts=[1] * 3)
    for other in others:
        assert torch.equal(first.topk_logp, other.topk_logp)
    assert len(first.sampled_logp) == 299


def test_samples_equal_in_process(client, teacher):
    prompts, seeds = random_sequences([9, 20, 4, 12]), [7, 2**40, 0, -3]
    for changes in ({}, {"temperature": 0.0}, {"temperature": 1.7, "top_k": 20, "top_p": 0.9}, {"logp": False}):
        sampling = SamplingSettings(max_new_tokens=12, stop_token_ids=(201,), **changes)
        there, here = (one.sample(prompts, seeds=seeds, sampling=sampling) for one in (client(), teacher))
        assert [one.token_ids for one in there] == [one.token_ids for one in here]
        assert [one.finish_reason for one in there] == [one.finish_reason for one in here]
        for ours, theirs in zip(there, here, strict=True):
            assert (ours.logp is None) == (theirs.logp is None)
            assert ours.logp is None or ours.logp == pytest.approx(theirs.logp, abs=1e-5)


def test_answers_end_at_the_limit(client):
    (prompt,) = random_sequences([MAX_LEN - 3])
    (sample,) = client().sample([prompt], seeds=[1], sampling=SamplingSettings(max_new_tokens=9, ignore_eos=True))
    assert (len(sample.token_ids), sample.finish_reason) == (3, "length")
    with pytest.raises(DistillError, match="has 500 tokens, must have fewer than 500; .*--max-model-len"):
        client().sample(random_sequences([MAX_LEN]), seeds=[1], sampling=SamplingSettings(max_new_tokens=9))


def test_the_handshake_passes(client):
    there = client()
    probe = make_probe(there, random_sequences([20, 30, 12, 9]))
    options = {"topk": TOPK, "vocab_size": VOCAB_SIZE, "temperature": 1.0, "limit": handshake.EXACT}
    assert [one.problem for one in answers(probe, **options)] == [None] * 4
    info = there.info()
    assert (info.path, info.digest, info.max_model_len) == (str(running.folder()), None, MAX_LEN)


def test_refused_requests_are_named(client):
    with pytest.raises(DistillError, match="refused a request .*greater than max allowed: 48"):
        client(topk=MAX_TOPK + 1).score([[3, 4]], response_starts=[1])
    with pytest.raises(DistillError, match=r"refused a request \(400\): .*512 is out of vocabulary"):
        client().score([[3, VOCAB_SIZE]], response_starts=[1])
    with pytest.raises(DistillError, match="gives ids up to .* those below 4 are shared with .*; use `distill"):
        client(vocab_size=4).score([[3, 4]], response_starts=[1])
    with pytest.raises(ConfigError, match=r"loss.temperature=1.5: a server of vLLM scores only at temperature 1"):
        client(temperature=1.5)


def test_what_it_lacks_is_refused(refusals, server, tmp_path):
    url = f"model.teacher.url={server.address}"
    found = refusals("loss.temperature=1.5", "loss.topk=64", "rollout.max_sequence_length=512")
    assert f"loss.temperature=1.5: {url} is a server of vLLM, which does not divide" in found
    assert "only `distill serve` does" in found
    assert f"loss.topk=64: {url} gives at most 48; start it with --max-logprobs 64, or lower it" in found
    assert f"{url}: takes 499 tokens, and sequences have up to" in found
    assert "start it with --max-model-len 5" in found
    wider = shutil.copytree(running.folder(), tmp_path / "wider")
    (wider / "model.safetensors").unlink()  # its tokenizer's files are enough
    config = (wider / "config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 576')
    (wider / "config.json").write_text(config)
    assert "its model has 576 ids, of which the student shares those below 512" in refusals(
        f"model.teacher.path={wider}"
    )


def test_another_tokenizer_is_refused(refusals, tmp_path):
    student, teacher = (
        shutil.copytree(running.folder().parent / name, tmp_path / name) for name in ("student", "teacher")
    )
    for folder in (student, teacher):
        tokenizer = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(tokenizer.replace('"<|im_start|>"', '"<|left|>"'))
    found = refusals(f"model.student.path={student}", f"model.teacher.path={teacher}")
    assert "its tokenizer is not the student's: id 1 is '<|im_start|>' there, and '<|left|>' in the student's" in found


def test_a_wrong_key_is_named(refusals, client, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    message = r"refuses the token \(Unauthorized\); set DISTILL_SERVER_TOKEN or VLLM_API_KEY"
    with pytest.raises(ConfigError, match=message):
        client().wait_ready()
    assert "refuses the token" in refusals()


def test_a_run_equals_one_in_process(server, teacher, tmp_path):
    metrics = []
    for name, more in (("served", f"model.teacher.url={server.address}"), ("here", "model.teacher.dtype=float32")):
        folder = tmp_path / name
        folder.mkdir()
        done = distill(folder, *RUN, more)
        assert done.status == 0, done.stderr
        metrics.append(done.metrics)
        if name == "served":
            warned = " ".join(done.stdout.split())
            assert "is a server of vLLM (0." in warned
            assert "which is slower than `distill serve`" in warned
            assert not list((done.run.path / "teachers").rglob("model.safetensors"))
    for ours, theirs in zip(*metrics, strict=True):
        assert ours.keys() == theirs.keys()
        if "train/loss" in ours:  # the last line has none
            assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-6)
            for name in ("train/kl_forward", "train/kl_reverse"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_a_lost_replica_is_left_out(client, teacher):
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    there, sequences = client(nobody), random_sequences([200] * 30)
    there.wait_ready()
    assert_equal_scores(there, teacher, sequences, [150] * 30, atol=1e-4)


def test_a_killed_server_is_lost(client, server):
    there = client(patience_s=1.0)
    there.wait_ready()
    end(server)
    with pytest.raises(TeacherLost, match=rf"no server of vLLM answered .*{server.address}.*\(vllm serve\)"):
        there.score([[3, 4]], response_starts=[1])
