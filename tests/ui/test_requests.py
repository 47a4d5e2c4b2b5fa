"""What the server answers, and what it refuses, over plain HTTP."""

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.report.made import make_run
from tests.ui.serving import CONFIG, append, make_running, make_sweep, serving

CROSS = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("ui")
    make_run(base / "secret", config=CONFIG)
    make_run(base / "runs/one", config=CONFIG)
    make_run(base / "runs/nested/two", config=CONFIG, recorded=())
    (base / "runs/linked").symlink_to(base / "secret")
    make_sweep(base / "runs/sweep", (0.3, 0.5), finished=1)
    return base / "runs"


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with serving(root) as address:
        yield address


def ask(
    address: str, path: str, method: str = "GET", *, host: str | None = None, **headers: str
) -> tuple[int, HTTPMessage, str]:
    """Send a request as it is written; return status, headers and text of the answer."""
    where = urlsplit(address)
    connection = http.client.HTTPConnection("127.0.0.1", where.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in ({"Host": where.netloc if host is None else host} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, answer.headers, text


def port_of(address: str) -> int:
    return urlsplit(address).port or 0


PAGES = ("/", "/lines", "/report?run=one", "/samples?run=one", "/now?run=one", "/log?run=one", "/page.js", "/vega.js")


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_answered(address: str, path: str) -> None:
    status, headers, text = ask(address, path)
    assert status == 200
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Frame-Options"] == "DENY"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert "unsafe-eval" not in policy
    assert not [name for name in headers if name.lower().startswith("access-control")]
    head, head_headers, nothing = ask(address, path, "HEAD")
    assert (head, nothing) == (200, "")
    assert head_headers["ETag"] == headers["ETag"]
    again, _, empty = ask(address, path, **{"If-None-Match": headers["ETag"]})
    assert (again, empty) == (304, "")
    assert path == "/log?run=one" or text


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get"])
def test_only_reading_is_allowed(address: str, method: str) -> None:
    status, headers, _ = ask(address, "/", method)
    assert status in (400, 405)
    assert "Access-Control-Allow-Origin" not in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}", ""]
)
def test_other_hosts_are_refused(address: str, host: str) -> None:
    status, headers, _ = ask(address, "/", host=host.format(port=port_of(address)))
    assert status == 403
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_own_names_are_answered(address: str, host: str) -> None:
    assert ask(address, "/", host=host.format(port=port_of(address)))[0] == 200


@pytest.mark.parametrize(
    "request_text",
    ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nHost: {own}\r\nHost: evil\r\n\r\n"],
)
def test_a_single_host_is_needed(address: str, request_text: str) -> None:
    with socket.create_connection(("127.0.0.1", port_of(address)), timeout=60) as connection:
        connection.sendall(request_text.format(own=urlsplit(address).netloc).encode())
        assert connection.recv(1000).split()[1] in (b"400", b"403")


@pytest.mark.parametrize("path", PAGES[:5])
def test_other_origins_are_refused(address: str, path: str) -> None:
    assert ask(address, path, Origin="http://evil.example")[0] == 403
    assert ask(address, path, Origin="null")[0] == 403
    assert ask(address, path, Origin=f"https://{urlsplit(address).netloc}")[0] == 403
    assert ask(address, path, Origin=address.rstrip("/"))[0] == 200
    assert ask(address, path, **CROSS)[0] == 403
    assert ask(address, path, **CROSS | {"Sec-Fetch-Site": "same-site"})[0] == 403
    frame = CROSS | {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    assert ask(address, path, **frame)[0] == 403
    assert ask(address, path, **frame | {"Sec-Fetch-Dest": "document"})[0] == 200


@pytest.mark.parametrize("route", ["report", "samples", "now", "log"])
@pytest.mark.parametrize(
    "name",
    [
        "../secret", "nested/../one", "nested", ".", "..", "", "/", "one/", "./one", "linked", "nope", "%2e%2e/secret",
        "nested%2ftwo", "nested%2Ftwo", "one%00", "one\\", "one&run=nope", "sweep/1_kl_weight=0.5", "sweep/..",
        "%2e%2e%5csecret", "..%c0%afsecret", "~", "$HOME", "one%0a", "one/config.yaml", "latest",
    ],
)  # fmt: skip
def test_only_listed_runs_are_shown(address: str, root: Path, route: str, name: str) -> None:
    status, _, text = ask(address, f"/{route}?run={name}")
    assert status == 404
    assert "loss" not in text
    assert ask(address, f"/{route}?run={root.parent}/secret")[0] == 404
    assert ask(address, f"/{route}")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/../secret/config.yaml", "/..%2fsecret/config.yaml", "/%2e%2e/app.py", "/app.py", "/one/config.yaml",
        "/run.html", "/report/", "//etc/passwd", "/page.js/", "/page.js%00", "/%2fetc/passwd", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_other_files_are_served(address: str, path: str) -> None:
    status, _, text = ask(address, path)
    assert status == 404
    assert "import" not in text
    assert "root:" not in text


def test_nested_runs_and_sweeps_are_shown(address: str) -> None:
    for name in ("nested/two", "sweep", "sweep/0_kl_weight=0.3", "one&run=nested/two&run=one"):
        assert ask(address, f"/report?run={name}")[0] == 200
    assert ask(address, "/samples?run=nested/two")[2] == "null"


def test_version_changes_with_files(tmp_path: Path) -> None:
    run = make_running(tmp_path / "run", recorded=())
    with serving(tmp_path) as address:

        def now() -> dict[str, str]:
            return json.loads(ask(address, "/now?run=run")[2])

        before = now()
        assert now() == before
        assert before["title"] == "running 12/40 - run"
        run.beat("train 40")
        assert now()["version"] == before["version"]
        append(run, 13)
        assert now()["version"] != before["version"]
        assert now()["line"].startswith("running, step 13 of 40, train")
        run.rank_log(0).write_text("one\n\x1b[31mtwo\x1b[0m\n")
        assert now()["log"] != before["log"]
        assert ask(address, "/log?run=run")[2] == "one\ntwo"
        (tmp_path / "secret.txt").write_text("secret")
        run.rank_log(0).unlink()
        run.rank_log(0).symlink_to("/etc/hostname")
        assert ask(address, "/log?run=run")[2] == ""


def test_damaged_runs_are_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", config=CONFIG)
    with serving(tmp_path) as address:
        assert ask(address, "/report?run=run")[0] == 200
        run.metrics.write_text('{"step": 0}\nnonsense\n')
        for route in ("report", "samples"):
            status, _, text = ask(address, f"/{route}?run=run")
            assert status == 500
            assert text.startswith(f"{run.metrics}: holds a line that is no row of metrics")
        run.metrics.write_text('{"step": 1, "time": 1, "train/loss": "<b>", "time/sync_s": [], "val/x": NaN}\n')
        assert ask(address, "/report?run=run")[0] == 200
        (run.rollouts / "step_20.parquet").write_bytes(b"PAR1 cut off")
        assert json.loads(ask(address, "/samples?run=run")[2])["unreadable"] == ["run/step_20.parquet"]
        (run.rollouts / "step_30.parquet").symlink_to("/etc/passwd")
        assert ask(address, "/report?run=run")[0] == 500
        (run.rollouts / "step_30.parquet").unlink()
        run.config.write_text("[1, 2]")
        assert ask(address, "/report?run=run")[0] == 200
        run.resolved.write_text('{"memory": {"parts": {"weights": "many"}}}')
        assert ask(address, "/report?run=run")[0] == 500


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["nowhere"], "nowhere: no such folder; give the folder that holds the runs (by default runs)"),
        (["file"], "file: is no folder; give the folder that holds the runs (by default runs)"),
        (["--port", "x"], "--port x: must be a whole number from 0 to 65535"),
        (["--port", "65536"], "--port 65536: must be a whole number from 0 to 65535"),
        (
            ["--port", "{taken}"],
            "--port {taken}: cannot listen there (Address already in use); give another, or 0 for any",
        ),
        (["--host", "0.0.0.0"], "--host: distill ui has no such flag"),
    ],
)
def test_mistakes_are_refused(tmp_path: Path, words: list[str], problem: str) -> None:
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "distill_cli", "ui", *(word.format(taken=port) for word in words)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {problem.format(taken=port)}")


def test_only_loopback_is_listened_at(address: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port_of(address)), timeout=60)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    make_run(tmp_path / "run", config=CONFIG).path.rename(tmp_path / os.fsdecode(b"\xff run"))
    with serving(tmp_path) as address:
        (line,) = json.loads(ask(address, "/lines")[2])["lines"]
        assert line["query"] == "run=%FF%20run"
        for route in ("report", "samples", "now", "log"):
            assert ask(address, f"/{route}?{line['query']}")[0] == 200
