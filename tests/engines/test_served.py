"""A served teacher against servers that misbehave: what may pass is retried, the rest is one line."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from distill_cli.engines.http_teacher import split_by_tokens
from distill_cli.engines.served import REQUEST_TOKENS, ServedTeacher
from distill_cli.engines.server_files import Server
from distill_cli.engines.server_info import ServerInfo
from distill_cli.engines.settings import SamplingSettings
from distill_cli.engines.wire import TOKEN, SampleRequest, ScoreRequest, pack
from distill_cli.errors import ConfigError, DistillError, TeacherLost, Unrecoverable
from distill_cli.serving.certificate import make_certificate
from tests.serving.test_request_checks import INFO

TOPK = 4
SEQUENCES, STARTS = [[5, 6, 7], [8, 9], [10]], [1, 1, 1]


class Double:
    """A server that answers right, unless `faults` has something for it: one for each request of /score."""

    def __init__(self, *faults: "Fault", info: ServerInfo = INFO) -> None:
        self.faults, self.info = list(faults), info
        self.requests: list[str] = []
        self.clients: set[str | None] = set()
        self.always: Fault | None = None
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                double.requests.append(self.path)
                if double.always is not None:
                    double.always(self, b"")
                elif self.path == "/info":
                    answer(self, json.dumps(double.info.to_json()).encode(), kind="application/json")
                else:
                    answer(self, b"{}", kind="application/json")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                double.requests.append(self.path)
                double.clients.add(self.headers["x-distill-client"])
                fault = double.always or (double.faults.pop(0) if double.faults else None)
                if fault is not None:
                    fault(self, right_answer(self.path, body))
                else:
                    answer(self, right_answer(self.path, body))

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


Fault = Callable[[Any, bytes], None]


def right_answer(path: str, body: bytes) -> bytes:
    if path == "/sample":
        request = SampleRequest.parse(body)
        ones = numpy.ones(len(request.lengths), numpy.int32)
        logp = {"logp": [-ones.astype(numpy.float32)]} if request.sampling.logp else {}
        return pack({"token_ids": [ones], "lengths": [ones], "stopped": [ones.astype(numpy.uint8)], **logp})
    return scores_of(ScoreRequest.parse(body))


def scores_of(request: ScoreRequest) -> bytes:
    """The first of the candidates of each token is the token itself."""
    rows, k = request.num_rows, request.topk
    begins = numpy.cumsum(request.lengths) - request.lengths
    parts = zip(begins, request.response_starts, request.lengths, strict=True)
    own = numpy.concatenate([request.token_ids[begin + start : begin + length] for begin, start, length in parts])
    ids = own[:, None] + numpy.arange(k, dtype=numpy.int32)
    logp = numpy.full((rows, k), -1.5, numpy.float32)
    return pack({"topk_ids": [ids], "topk_logp": [logp], "sampled_logp": [logp[:, 0]]})


def answer(
    handler: Any, body: bytes, *, status: int = 200, kind: str = "application/octet-stream", **more: str
) -> None:
    handler.send_response(status)
    headers = {"content-type": kind, "content-length": str(len(body)), **more}
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def status(number: int, sentence: str = "no", **headers: str) -> Fault:
    body = json.dumps({"error": sentence}).encode()
    return lambda handler, _: answer(handler, body, status=number, kind="application/json", **headers)


def html(handler: Any, _: bytes) -> None:
    answer(handler, b"<html>It works!</html>", kind="text/html")


def cut(handler: Any, body: bytes) -> None:
    handler.send_response(200)
    handler.send_header("content-length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: len(body) // 2])
    handler.close_connection = True


def drop(handler: Any, _: bytes) -> None:
    handler.close_connection = True


def other_shape(handler: Any, _: bytes) -> None:
    answer(handler, scores_of(ScoreRequest.of([[1, 2]], [1], topk=TOPK, temperature=1.0)))


def other_dtype(handler: Any, body: bytes) -> None:
    answer(handler, body.replace(b'"F32"', b'"I32"', 1))


def half_a_body(handler: Any, body: bytes) -> None:
    answer(handler, body[: len(body) // 2])


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN, raising=False)


@contextmanager
def served(*doubles: Double, **options: Any) -> Iterator[ServedTeacher]:
    addresses = [double.address for double in doubles]
    teacher = ServedTeacher(addresses, **{"topk": TOPK, "patience_s": 20.0, "probe_s": 5.0, **options})
    yield teacher
    teacher.close()
    teacher.close()
    for double in doubles:
        double.close()


def assert_right(teacher: ServedTeacher, *, repeat: int = 1) -> None:
    scores = teacher.score(SEQUENCES * repeat, response_starts=STARTS * repeat)
    assert [one.topk_ids[:, 0].tolist() for one in scores] == [[6, 7], [9], []] * repeat
    assert [one.topk_logp.shape for one in scores] == [(2, TOPK), (1, TOPK), (0, TOPK)] * repeat
    assert all(one.topk_ids.dtype is torch.int32 and one.sampled_logp.dtype is torch.float32 for one in scores)


@pytest.mark.parametrize("fault", [html, cut, drop, other_shape, other_dtype, half_a_body, status(500), status(503)])
def test_what_may_pass_is_retried(fault: Fault) -> None:
    with served(double := Double(fault, fault)) as teacher:
        assert_right(teacher)
    assert double.requests.count("/score") == 3


def test_an_engine_that_keeps_failing() -> None:
    fault = status(500, "the teacher failed: out of memory")
    with served(double := Double(fault, fault, fault)) as teacher:
        with pytest.raises(DistillError, match="again and again: status 500, the teacher failed: out of memory"):
            teacher.score(SEQUENCES, response_starts=STARTS)
        assert_right(teacher)
    assert double.requests.count("/score") == 4


def test_a_hanging_server_is_left() -> None:
    ended = threading.Event()
    hanging, other = Double(), Double()
    with served(hanging, other, probe_s=1.0) as teacher:
        teacher.wait_ready()
        hanging.always = lambda *_: ended.wait(30)  # type: ignore[assignment]
        assert_right(teacher)
        assert_right(teacher)
        ended.set()


def test_slow_answers_are_waited_for() -> None:
    """A server that answers probes may take longer than they do."""

    def slow(handler: Any, body: bytes) -> None:
        time.sleep(1.3)
        answer(handler, body)

    with served(double := Double(slow), probe_s=0.5) as teacher:
        assert_right(teacher)
    assert double.requests.count("/score") == 1
    assert "/health" in double.requests


def test_retry_after_is_kept() -> None:
    with served(Double(status(503, "full", retry_after="1"))) as teacher:
        begin = time.monotonic()
        assert_right(teacher)
        assert time.monotonic() - begin >= 1.0


def test_patience_ends() -> None:
    double = Double()
    double.always = status(503, "the model is being loaded")
    with served(double, patience_s=0.6) as teacher, pytest.raises(TeacherLost) as caught:
        teacher.score(SEQUENCES, response_starts=STARTS)
    message = str(caught.value)
    assert double.address in message
    assert "status 503, the model is being loaded" in message
    assert "distill serve" in message
    assert "\n" not in message


def test_nobody_there_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    teacher = ServedTeacher([address], topk=TOPK, patience_s=0.5)
    for call in (teacher.wait_ready, teacher.info, lambda: teacher.score(SEQUENCES, response_starts=STARTS)):
        with pytest.raises(TeacherLost, match=f"{address}: ConnectError"):
            call()
    teacher.close()


def test_refusals_are_not_retried() -> None:
    with served(double := Double(status(422, "topk is 4, this server allows 1 to 2"))) as teacher:
        with pytest.raises(DistillError, match="refused a request .*topk is 4, this server allows 1 to 2"):
            teacher.score(SEQUENCES, response_starts=STARTS)
        assert_right(teacher)
    assert double.requests.count("/score") == 2


@pytest.mark.parametrize("number", [401, 403])
def test_a_refused_token_is_named(number: int) -> None:
    double = Double()
    double.always = status(number)
    with served(double) as teacher, pytest.raises(ConfigError, match=f"refuses the token.* set {TOKEN}"):
        teacher.wait_ready()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (html, "not a scoring server.*text/html: '<html>It works!</html>'"),
        (status(404, "Not Found"), "not a scoring server.*answered 404.*Not Found"),
        (lambda handler, _: answer(handler, b'{"object": "list"}', kind="application/json"), "object"),
        (lambda handler, _: answer(handler, b'{"product": "distill", "api": 99}'), "API 99, and this client has"),
        (lambda handler, _: answer(handler, b'{"product": "distill", "api": 1}'), "info cannot be read"),
    ],
)
def test_other_servers_are_refused(content: Fault, message: str) -> None:
    double = Double()
    double.always = content
    with served(double) as teacher, pytest.raises(ConfigError, match=message) as caught:
        teacher.wait_ready()
    assert double.address in str(caught.value)


def test_another_model_after_restart() -> None:
    with served(double := Double()) as teacher:
        assert_right(teacher)
        double.info = replace(INFO, digest="another", path="other")
        double.faults = [drop]
        with pytest.raises(
            Unrecoverable, match="serves other .*digest another.*, and the scores so far are those of m .*digest d"
        ):
            teacher.score(SEQUENCES, response_starts=STARTS)


def test_the_same_model_after_restart() -> None:
    first = Double()
    with served(first) as teacher:
        assert_right(teacher)
        first.close()
        threading.Timer(0.5, lambda: restart(first)).start()
        assert_right(teacher)


def restart(double: Double) -> None:
    double.http.__init__(double.http.server_address, double.http.RequestHandlerClass)  # type: ignore[misc]
    double.http.daemon_threads = True
    threading.Thread(target=double.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> str:
    file, _ = make_certificate(tmp_path_factory.mktemp("certificate"), ["127.0.0.1"])
    return file.read_text()


def test_servers_are_found_anew(certificate: str) -> None:
    """One is waited for, moves to another address while requests fail, and has another model at last."""
    doubles: list[Double] = []

    def find() -> list[Server]:
        return [Server(double.address, certificate) for double in doubles]

    teacher = ServedTeacher([], topk=TOPK, patience_s=20.0, probe_s=5.0, find=find)
    threading.Timer(1.0, lambda: doubles.append(Double())).start()
    teacher.wait_ready()
    assert_right(teacher)
    assert teacher.comebacks == 0
    doubles[0].close()
    threading.Timer(1.0, lambda: doubles.__setitem__(0, Double())).start()
    wait_until(lambda: (assert_right(teacher), teacher.comebacks == 1)[1])
    doubles.append(Double())
    several = 2 * REQUEST_TOKENS // 5  # one request would always go to the first
    wait_until(lambda: (assert_right(teacher, repeat=several), teacher.comebacks == 2)[1])
    doubles[:] = [*doubles, Double(info=replace(INFO, digest="other"))]
    with pytest.raises(Unrecoverable, match="start it with the same model"):
        wait_until(lambda: (assert_right(teacher, repeat=2 * several), False)[1])
    teacher.close()
    for double in doubles:
        double.close()


def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.1)


def test_no_server_at_all_is_lost() -> None:
    teacher = ServedTeacher([], topk=TOPK, patience_s=0.5, find=list)
    with pytest.raises(TeacherLost, match="none is there.*see the output of the teacher's job"):
        teacher.wait_ready()
    with pytest.raises(TeacherLost, match="none is there"):
        teacher.score(SEQUENCES, response_starts=STARTS)
    teacher.close()


def test_a_loading_server_is_not_lost() -> None:
    with served(Double(*[loads] * 12), patience_s=3.0) as teacher:
        assert_right(teacher)


def loads(handler: Any, _: bytes) -> None:
    body = json.dumps({"error": "loading", "state": "loading"}).encode()
    answer(handler, body, status=503, kind="application/json", retry_after="0")


def test_replicas_share_the_work() -> None:
    doubles = Double(), Double(), Double()
    with served(*doubles) as teacher:
        assert_right(teacher, repeat=12 * REQUEST_TOKENS // 5)
    counts = [double.requests.count("/score") for double in doubles]
    assert sum(counts) == 13
    assert min(counts) >= 1


def test_a_lost_replica_is_left_out() -> None:
    """Its requests go to the other one, and it takes part again when it is back."""
    lost, other = Double(), Double()
    with served(lost, other) as teacher:
        teacher.wait_ready()
        lost.always = drop
        assert_right(teacher, repeat=6 * REQUEST_TOKENS // 5)
        lost.always, before = None, lost.requests.count("/score")
        deadline = time.monotonic() + 20
        while lost.requests.count("/score") == before and time.monotonic() < deadline:
            assert_right(teacher, repeat=2 * REQUEST_TOKENS // 5)
        assert lost.requests.count("/score") > before


def test_replicas_of_two_models_are_refused() -> None:
    doubles = Double(), Double(info=replace(INFO, digest="another"))
    with served(*doubles) as teacher, pytest.raises(DistillError, match="serves m .*are those of m "):
        teacher.wait_ready()


def test_submit_works_meanwhile() -> None:
    may_answer = threading.Event()

    def slow(handler: Any, body: bytes) -> None:
        may_answer.wait(20)
        answer(handler, body)

    with served(Double(slow)) as teacher:
        wait = teacher.submit(SEQUENCES, response_starts=STARTS)
        may_answer.set()
        assert [one.topk_ids[:, 0].tolist() for one in wait()] == [[6, 7], [9], []]


def test_a_stopping_run_does_not_wait() -> None:
    double = Double()
    double.always = status(503)
    with served(double, should_stop=lambda: True) as teacher:
        scores = teacher.score(SEQUENCES, response_starts=STARTS)
        assert [len(one.sampled_logp) for one in scores] == [0, 0, 0]
        (sample,) = teacher.sample([[1]], seeds=[1], sampling=SamplingSettings(max_new_tokens=2))
        assert sample.token_ids == []
        with pytest.raises(DistillError, match="stopped before"):
            teacher.wait_ready()


def test_closing_ends_what_waits() -> None:
    double = Double()
    double.always = status(503)
    with served(double) as teacher:
        wait = teacher.submit(SEQUENCES, response_starts=STARTS)
        teacher.close()
        with pytest.raises(DistillError, match="is closed"):
            wait()
        with pytest.raises(DistillError, match="is closed"):
            teacher.score(SEQUENCES, response_starts=STARTS)


def test_samples_are_checked_and_delivered() -> None:
    delivered = []
    with served(Double(half_a_body)) as teacher:
        for logp in (True, False):
            samples = teacher.sample(
                [[1], [2, 3]],
                seeds=[1, 2],
                sampling=SamplingSettings(max_new_tokens=2, logp=logp),
                on_end=lambda index, _: delivered.append(index),
            )
            assert [sample.token_ids for sample in samples] == [[1], [1]]
            assert [sample.logp for sample in samples] == [[-1.0] if logp else None] * 2
            assert [sample.finish_reason for sample in samples] == ["stop", "stop"]
    assert delivered == [0, 1, 0, 1]


def test_nothing_to_score_sends_nothing() -> None:
    with served(double := Double()) as teacher:
        assert teacher.score([], response_starts=[]) == []
        assert [len(one.topk_ids) for one in teacher.score([[3]], response_starts=[1])] == [0]
        with pytest.raises(DistillError, match="response 0 starts at 0"):
            teacher.score([[3]], response_starts=[0])
    assert "/score" not in double.requests


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8008", "must begin with http:// or https://"),
        ("ftp://host", "must begin with"),
        ("http://", "must begin with"),
        ("http://host:port", "not the address"),
        ("http://user:secret@host", "http://host: has more than"),
        ("http://host?token=secret", "http://host: has more than"),
    ],
)
def test_addresses_are_checked(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ServedTeacher([address], topk=TOPK)
    assert "secret" not in str(caught.value)


def test_tokens_do_not_travel_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    with pytest.raises(ConfigError, match=f"the token of {TOKEN} would travel in the clear; use https"):
        ServedTeacher(["http://10.0.0.1:8008"], topk=TOPK)
    for address in ("http://localhost:1", "http://127.0.0.2:1", "http://[::1]:1", "https://10.0.0.1"):
        ServedTeacher([address], topk=TOPK).close()


def test_unreadable_certificates_are_named(tmp_path: Path) -> None:
    (empty := tmp_path / "empty.crt").touch()
    for file in (tmp_path / "none.crt", empty):
        with pytest.raises(ConfigError, match=f"{file.name}: cannot be read as a certificate"):
            ServedTeacher(["https://127.0.0.1:1"], topk=TOPK, certificate=file)


def test_groups_have_few_tokens() -> None:
    assert split_by_tokens([3, 3, 3, 9, 1], 6) == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]
    assert split_by_tokens([], 6) == []
