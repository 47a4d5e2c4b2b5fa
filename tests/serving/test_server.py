"""Real servers on loopback: what they answer, and how they end. The last two tests end the servers that they use."""

import asyncio
import os
import re
import signal
import socket
import ssl
import threading
import time

from distill_cli.engines.process_setup import prepare_process

prepare_process()  # before torch

import httpx  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from distill_cli.engines import served  # noqa: E402
from distill_cli.engines.served import ServedTeacher  # noqa: E402
from distill_cli.engines.settings import EngineSettings, SamplingSettings  # noqa: E402
from distill_cli.engines.teacher import VllmTeacher  # noqa: E402
from distill_cli.engines.wire import HeadRequest, ScoreRequest, pack, unpack  # noqa: E402
from distill_cli.errors import ConfigError, DistillError  # noqa: E402
from distill_cli.models import model_files, model_pair  # noqa: E402
from distill_cli.serving.certificate import make_certificate  # noqa: E402
from tests.conftest import shared_memory_left  # noqa: E402
from tests.engines.conftest import group_of_one  # noqa: E402

from . import running  # noqa: E402
from .running import HEADERS  # noqa: E402

pytestmark = pytest.mark.slow

VOCAB_SIZE, MAX_LEN, MAX_TOPK = 512, 512, 48
QUEUED = 4096
"""Tokens that may wait at the small server."""


@pytest.fixture(scope="module")
def server():
    started = running.start(f"--max-topk={MAX_TOPK}")
    started.seen = started.wait_ready()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"), ["127.0.0.1", "localhost"])


@pytest.fixture(scope="module")
def small(certificate):
    """A server with TLS and a short queue."""
    files = f"--certificate={certificate[0]}", f"--key={certificate[1]}"
    started = running.start(f"--max-queued-tokens={QUEUED}", *files, scheme="https")
    started.wait_ready(verify=trust(certificate))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    settings = EngineSettings(str(running.folder()), max_model_len=MAX_LEN, dtype="float32", kv_cache_bytes=64 << 20)
    with group_of_one(tmp_path_factory.mktemp("store")):
        teacher = VllmTeacher(settings, topk=MAX_TOPK)
        yield teacher
        teacher.close()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("DISTILL_SERVER_TOKEN", running.TOKEN)


@pytest.fixture
def client(server):
    """Make clients of the server with the options of a call."""
    made = []

    def make(**options):
        made.append(ServedTeacher([server.address], **{"topk": 16, "patience_s": 60.0, **options}))
        return made[-1]

    yield make
    for one in made:
        one.close()


def trust(certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate[0])


def random_sequences(lengths, *, seed=0, below=VOCAB_SIZE):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, below, (length,), generator=generator).tolist() for length in lengths]


def body(lengths, *, topk=1, seed=0):
    sequences = random_sequences(lengths, seed=seed)
    return ScoreRequest.of(sequences, [1] * len(lengths), topk=topk, temperature=1.0).body()


def assert_equal(ours, theirs, *, atol=0.0):
    for scores, other in zip(ours, theirs, strict=True):
        for name in ("topk_ids", "topk_logp", "sampled_logp"):
            torch.testing.assert_close(getattr(scores, name), getattr(other, name), atol=atol, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"topk": 1}, {"topk": MAX_TOPK, "temperature": 0.6}, {"topk": 5, "temperature": 1.7, "vocab_size": 300}],
    ids=str,
)
def test_scores_equal_those_in_process(client, teacher, options):
    sequences = random_sequences([9, 60, MAX_LEN, 17, 2], below=options.get("vocab_size", VOCAB_SIZE))
    starts = [3, 20, 100, 17, 1]
    own = teacher.score(sequences, response_starts=starts, **{"topk": 16, **options})
    assert_equal(client(**options).score(sequences, response_starts=starts), own)


def test_hidden_states_and_head_equal_those_in_process(client, teacher, monkeypatch):
    sequences, starts = random_sequences([9, 60, MAX_LEN, 17, 2]), [3, 20, 100, 17, 1]
    own = teacher.score(sequences, response_starts=starts, hidden=True)
    one = client()
    for ours, theirs in zip(one.score(sequences, response_starts=starts, hidden=True), own, strict=True):
        assert ours.hidden.equal(theirs.hidden) or len(ours.hidden) == len(theirs.hidden) == 0
    monkeypatch.setattr(served, "HEAD_BYTES", 100 * 4 * own[0].hidden.shape[1])  # in several parts
    head = teacher.head()
    for rows in (None, (0, 50), (130, VOCAB_SIZE + 100), (VOCAB_SIZE, VOCAB_SIZE + 100)):
        assert one.head(rows).weight.equal(head.part(rows).weight)
    assert (one.head().bias, one.head().scale) == (head.bias, head.scale)


def test_batches_change_nothing(client, teacher):
    """Of a call that takes several requests, and of clients whose sequences share batches."""
    calls = [random_sequences([300, 40, 511, 7] * 10, seed=seed) for seed in range(3)]
    starts = [1, 39, 500, 2] * 10
    waits = [client(topk=1 + seed).submit(ids, response_starts=starts) for seed, ids in enumerate(calls)]
    for seed, (ids, wait) in enumerate(zip(calls, waits, strict=True)):
        assert_equal(wait(), teacher.score(ids, response_starts=starts, topk=1 + seed), atol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(max_new_tokens=24),
        SamplingSettings(max_new_tokens=24, temperature=0.0, logp=False),
        SamplingSettings(max_new_tokens=9, temperature=0.8, top_p=0.9, top_k=7, stop=(" ",), stop_token_ids=(5,)),
    ],
)
def test_samples_equal_those_in_process(client, teacher, sampling):
    prompts, seeds = random_sequences([5, 1, 90, MAX_LEN - 3], below=400), [1, -2, 2**40, 4]
    ours = client(vocab_size=400).sample(prompts, seeds=seeds, sampling=sampling)
    assert ours == teacher.sample(prompts, seeds=seeds, sampling=sampling, vocab_size=400)
    assert max(max(sample.token_ids) for sample in ours) < 400


def test_health_says_what_is_missing(server):
    loading = server.seen[0]
    assert loading.status_code == 503
    assert loading.json() == {"error": "the model is being loaded", "state": "loading"}
    assert int(loading.headers["retry-after"]) > 0
    assert server.seen[-1].json() == {"state": "ready"}


def test_info_describes_the_model(client, server):
    info, folder = client().info(), running.folder()
    assert server.get("/info").json()["product"] == "distill"
    assert info.path == running.TEACHER
    assert info.digest == model_files.fingerprint(folder)
    assert (info.vocab_size, info.max_model_len, info.max_topk) == (VOCAB_SIZE, MAX_LEN, MAX_TOPK)
    assert (info.dtype, info.quantization, info.num_engines) == ("float32", None, 1)
    assert info.chat_template == model_pair.chat_template(folder)
    assert info.special_tokens == model_pair.special_tokens(folder)
    assert info.eos_ids == model_files.ModelFiles.find(str(folder), key="path").eos_ids
    assert client().vocabulary() == model_files.vocabulary(folder)


def test_it_prints_what_runs_need(server):
    printed = "".join(server.lines)
    assert f"distill model.teacher.url={server.address} ..." in printed
    assert "top-48" in printed


def test_metrics_count_work(server):
    before = {
        name: server.metric(name) for name in ('distill_tokens_total{kind="score"}', "distill_batch_seconds_count")
    }
    answered = 'distill_requests_total{route="/score",status="200"}'
    count = server.metric(answered)
    assert server.post("/score", body([100, 20])).status_code == 200
    assert server.metric('distill_tokens_total{kind="score"}') == before['distill_tokens_total{kind="score"}'] + 120
    assert server.metric("distill_batch_seconds_count") == before["distill_batch_seconds_count"] + 1
    assert server.metric(answered) == count + 1
    assert server.metric("distill_queued_tokens") == 0


@pytest.mark.parametrize(
    ("route", "content", "status", "message"),
    [
        ("/score", b"", 422, "not in the format of safetensors"),
        ("/score", b"{}" * 50, 422, "not in the format of safetensors"),
        ("/score", body([5])[:-3], 422, "the body has .* bytes, its header describes"),
        ("/score", pack({}, {"topk": "1"}), 422, "the tensors are none, must be"),
        ("/score", body([5], topk=MAX_TOPK + 1), 422, f"allows 1 to {MAX_TOPK}; start it with --max-topk 49"),
        ("/score", body([5, MAX_LEN + 1]), 422, "sequence 1 has 513 tokens, allowed are 1 to 512"),
        ("/sample", body([5]), 422, "must be lengths, seeds, token_ids"),
        ("/head", body([5]), 422, "the tensors are lengths, response_starts, token_ids, must be rows"),
        (
            "/head",
            HeadRequest(3, VOCAB_SIZE + 1).body(),
            422,
            f"rows end at {VOCAB_SIZE + 1}, the head has {VOCAB_SIZE}",
        ),
        ("/health", b"", 405, "Method Not Allowed"),
        ("/v1/completions", b"{}", 404, "Not Found; the routes are /files, /head, /health"),
    ],
)
def test_bad_requests_are_one_sentence(server, route, content, status, message):
    answer = server.post(route, content)
    assert answer.status_code == status
    (sentence,) = answer.json().values()
    assert re.search(message, sentence)
    assert "\n" not in sentence


def test_ids_outside_the_vocabulary(server):
    request = ScoreRequest.of([[3, 4], [5, VOCAB_SIZE]], [1, 1], topk=1, temperature=1.0)
    answer = server.post("/score", request.body())
    assert (answer.status_code, answer.json()) == (
        422,
        {"error": "sequence 1 has token id 512, allowed are 0 to 511"},
    )


def test_a_refusal_reaches_the_caller(client):
    with pytest.raises(DistillError, match="refused a request .*--max-topk 49"):
        client(topk=MAX_TOPK + 1).score([[3, 4]], response_starts=[1])


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": running.TOKEN}])
def test_every_route_needs_the_token(server, headers):
    for route in ("/health", "/info", "/vocabulary", "/metrics", "/docs", "/nothing"):
        assert server.get(route, headers=headers).status_code == 401
    for route in ("/score", "/sample"):
        answer = server.post(route, body([5]), headers=headers)
        assert answer.status_code == 401
        assert running.TOKEN not in answer.text


def test_a_wrong_token_is_named(server, monkeypatch):
    monkeypatch.setenv("DISTILL_SERVER_TOKEN", "wrong")
    teacher = ServedTeacher([server.address], topk=4)
    with pytest.raises(ConfigError, match="refuses the token .*set DISTILL_SERVER_TOKEN"):
        teacher.wait_ready()
    teacher.close()


@pytest.mark.exhaustive
def test_certificates_are_checked(small, certificate):
    stranger = ServedTeacher([small.address], topk=4)
    with pytest.raises(ConfigError, match="its certificate is not trusted"):
        stranger.wait_ready()
    stranger.close()
    friend = ServedTeacher([small.address], topk=4, certificate=certificate[0])
    assert len(friend.score([[3, 4, 5]], response_starts=[1])[0].topk_ids) == 2
    friend.close()
    assert os.stat(certificate[1]).st_mode & 0o777 == 0o600


def test_a_full_queue_says_when(small, certificate):
    async def post_many():
        async with httpx.AsyncClient(verify=trust(certificate), headers=HEADERS, timeout=60) as http:
            one = body([MAX_LEN] * 8)
            return await asyncio.gather(*(http.post(f"{small.address}/score", content=one) for _ in range(12)))

    answers = asyncio.run(post_many())
    full = [answer for answer in answers if answer.status_code == 503]
    assert 3 <= len(full) < 12
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in full)
    assert "tokens wait, the limit is 4096" in full[0].json()["error"]


def test_clients_outlast_a_full_queue(small, certificate):
    teachers = [ServedTeacher([small.address], topk=2, certificate=certificate[0]) for _ in range(3)]
    waits = [one.submit(random_sequences([MAX_LEN] * 24), response_starts=[1] * 24) for one in teachers]
    assert [len(wait()) for wait in waits] == [24] * 3
    for one in teachers:
        one.close()


def test_large_bodies_are_refused(small, certificate):
    options = {"verify": trust(certificate)}
    answer = small.post("/score", body([MAX_LEN] * 9), **options)
    assert (answer.status_code, "--max-queued-tokens" in answer.text) == (422, True)
    size = 16 * QUEUED + 2**17 + 1
    for content in (bytes(size), (bytes(2**14) for _ in range(size // 2**14 + 1))):
        answer = small.post("/score", content, **options)
        assert answer.status_code == 413
        assert "the limit is 196608" in answer.json()["error"]
    assert small.get("/health", **options).status_code == 200


def test_a_client_that_leaves_frees_its_work(server):
    before = server.metric('distill_tokens_total{kind="score"}')
    with pytest.raises(httpx.ReadTimeout):
        server.post("/score", body([MAX_LEN] * 400), timeout=0.5)
    while server.metric("distill_queued_tokens"):
        time.sleep(0.05)
    assert server.post("/score", body([5])).status_code == 200  # after the batches that the engine had
    assert server.metric('distill_tokens_total{kind="score"}') - before < 400 * MAX_LEN


def test_half_a_request_is_nothing(server):
    with socket.create_connection(("127.0.0.1", server.port)) as cut:
        head = (
            f"POST /score HTTP/1.1\r\nhost: h\r\nauthorization: Bearer {running.TOKEN}\r\ncontent-length: 999\r\n\r\n"
        )
        cut.sendall(head.encode() + b"some")
    assert server.post("/score", body([5])).status_code == 200
    assert not [line for line in server.lines if "Traceback" in line]


def test_eight_clients_take_turns(client):
    """Seven small requests do not wait for the large one that came before them."""
    large = client()
    large.wait_ready()
    others = [client() for _ in range(7)]
    for one in others:
        one.wait_ready()
    wait, ended = large.submit(random_sequences([MAX_LEN] * 200), response_starts=[1] * 200), []
    waiter = threading.Thread(target=lambda: ended.append(len(wait())))
    waiter.start()
    waits = [one.submit(random_sequences([40, 50]), response_starts=[1, 1]) for one in others]
    for answer in waits:
        assert [len(one.topk_ids) for one in answer()] == [39, 49]
    assert not ended
    waiter.join()
    assert ended == [200]


def test_a_dead_engine_ends_the_server(server, small, certificate):
    """It says why; a client of two servers goes on with the other one."""
    addresses = [small.address, server.address]
    teacher = ServedTeacher(addresses, topk=4, certificate=certificate[0], probe_s=2.0)
    teacher.wait_ready()
    wait = teacher.submit(random_sequences([MAX_LEN] * 60), response_starts=[1] * 60)
    (engine,) = small.engines
    engine.kill()
    assert small.process.wait(30) == 1
    assert [len(one.sampled_logp) for one in wait()] == [MAX_LEN - 1] * 60
    teacher.close()
    reason = [line for line in small.lines if line.startswith("error: ")]
    assert reason == [f"error: an engine's process ({running.folder()}) was killed by SIGKILL (out of memory?)\n"]
    assert not engine.is_running()


def test_sigterm_finishes_what_was_accepted(server):
    left_before = shared_memory_left()
    answers = []
    accepted = threading.Thread(target=lambda: answers.append(server.post("/score", body([MAX_LEN] * 120))))
    accepted.start()
    while server.metric("distill_queued_tokens") == 0:
        time.sleep(0.01)
    engines = server.engines
    server.process.send_signal(signal.SIGTERM)
    late = []
    while not late or late[-1].status_code == 200:
        late.append(server.post("/score", body([5])))
    assert late[-1].status_code == 503
    assert "stopping" in late[-1].json()["error"]
    accepted.join()
    assert [answer.status_code for answer in answers] == [200]
    assert unpack(answers[0].content)[0]["sampled_logp"].shape == (120 * (MAX_LEN - 1),)
    assert server.process.wait(30) == 0
    assert engines
    assert not any(engine.is_running() for engine in engines)
    assert shared_memory_left() <= left_before
