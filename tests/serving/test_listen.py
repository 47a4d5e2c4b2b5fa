"""What a server refuses before it loads a model."""

import re
import socket
from pathlib import Path

import pytest

from distill_cli.errors import ConfigError
from distill_cli.jobs.serving import compose_server
from distill_cli.serving.certificate import make_certificate
from distill_cli.serving.engine_processes import visible_devices
from distill_cli.serving.server import Listen, bind, check_listen, is_loopback


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"), ["node7", "10.0.0.7"])


def test_loopback_needs_neither() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert is_loopback(host)
        check_listen(Listen(host, 0), None)
        check_listen(Listen(host, 0), "token")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "node7"])
def test_other_addresses_need_both(host: str, files: tuple[Path, Path]) -> None:
    assert not is_loopback(host)
    check_listen(Listen(host, 0, *files), "token")
    for listen, token, message in (
        (Listen(host, 0, *files), None, "DISTILL_SERVER_TOKEN is not set"),
        (Listen(host, 0, *files), "", "DISTILL_SERVER_TOKEN is not set"),
        (Listen(host, 0), "token", "the token would travel in the clear; give --certificate and --key"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_listen(listen, token)
    with pytest.raises(ConfigError) as caught:
        check_listen(Listen(host, 0), None)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("token", [" ", "a\n", "ü", "a ", ""])
def test_tokens_fit_a_header(token: str) -> None:
    with pytest.raises(ConfigError, match="DISTILL_SERVER_TOKEN: is empty, or has characters"):
        check_listen(Listen("127.0.0.1", 0), token)


def test_certificates_are_read_first(tmp_path: Path, files: tuple[Path, Path]) -> None:
    (other := tmp_path / "other").mkdir()
    key = make_certificate(other, ["h"])[1]
    for pair in ((tmp_path / "none", files[1]), (files[1], files[0]), (files[0], key)):
        with pytest.raises(ConfigError, match="cannot be used"):
            check_listen(Listen("127.0.0.1", 0, *pair), None)
    with pytest.raises(ConfigError, match="one is given without the other"):
        check_listen(Listen("127.0.0.1", 0, files[0]), None)


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot listen there .*give another --port"):
            bind(Listen("127.0.0.1", port))


def test_the_teacher_is_enough() -> None:
    config = compose_server(["model.teacher.path=/models/big", "engine.teacher.tensor_parallel=2"])
    assert (config.model.teacher.path, config.model.teacher.dtype.value) == ("/models/big", "bfloat16")
    assert config.engine.teacher.kv_cache_gib is None  # the embedded pair has a small one
    assert (config.engine.teacher.gpu_memory_utilization, config.engine.teacher.tensor_parallel) == (0.9, 2)
    assert compose_server([]).model.teacher.path == "package://tiny_pair/teacher"
    pair = compose_server(["model=gpt_oss_20b_120b", "engine.teacher.gpu_memory_utilization=0.5"])
    assert (pair.model.teacher.path, pair.engine.teacher.gpu_memory_utilization) == ("openai/gpt-oss-120b", 0.5)
    assert compose_server(["model=custom", "model.teacher.path=a"]).model.teacher.path == "a"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.topk=4", "does not read it; give --max-topk"),
        ("model.student.path=x", "does not read it; leave it out"),
        ("train.max_steps=4", "does not read it"),
        ("engine=tiny,default", "several values are a sweep"),
        ("model.teacher.pth=x", "pth"),
        ("cluster=slurm", "distill serve runs where it is typed"),
    ],
)
def test_what_is_not_read_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose_server([override])


def test_engines_see_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices(3) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-ab,7")
    assert visible_devices(2) == ["4", "GPU-ab"]
