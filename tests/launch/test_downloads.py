"""One process of a node brings a model, its ranks find it in the cache: counted by a small hub of our own."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill_cli.models.model_files import ASSETS

MODEL = ASSETS / "tiny_pair" / "student"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
RANK = """
import os
from distill_cli.models.model_files import locate
os.write(1, f"{locate('org/model', key='model.student.path')}\\n".encode())  # at once: ranks share the output
"""
NODE = """
import sys
from pathlib import Path
from distill_cli.config.compose import compose
from distill_cli.jobs.preflight import preflight
from distill_cli.launch import local
from distill_cli.models.model_files import locate
from distill_cli.folders.run_dir import create

folder, rank = Path(sys.argv[1]), sys.argv[2]
locate("org/model", key="model.student.path")  # as the starter of ranks does
print("launch", flush=True)
agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", rank]
local.command = lambda run, options, **_: agent
resolved = preflight(compose(["cluster.ranks_per_node=3"])[0].config)
local.start_ranks(resolved, create(folder, command=[]))
"""


def etag(name: str) -> str:
    return hashlib.sha1(name.encode()).hexdigest()


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub, for one model."""

    requests: Counter

    def do_GET(self) -> None:
        self.requests[self.command, self.path.split("?")[0]] += 1
        if "/tree/" in self.path:
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": etag(file.name)}
                for file in MODEL.iterdir()
            ]
            content = json.dumps(files).encode()
        elif self.path.startswith("/api/models/org/model"):
            files = [{"rfilename": file.name} for file in MODEL.iterdir()]
            content = json.dumps({"id": "org/model", "sha": COMMIT, "siblings": files}).encode()
        else:
            content = (MODEL / self.path.split("?")[0].rsplit("/", 1)[1]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag(self.path.rsplit("/", 1)[1])}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, Counter]]:
    requests: Counter = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Counted", (Hub,), {"requests": requests}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


def node(tmp_path: Path, name: str, **env: str) -> subprocess.CompletedProcess:
    """Brings the model, and starts three ranks that look for it."""
    (tmp_path / "rank.py").write_text(RANK)
    return subprocess.run(
        [sys.executable, "-c", NODE, str(tmp_path / name), str(tmp_path / "rank.py")],
        env={**os.environ, "HF_HOME": str(tmp_path / "cache"), **env}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.exhaustive
def test_one_process_of_a_node_downloads(tmp_path: Path, hub: tuple[str, Counter]) -> None:
    address, requests = hub
    done = node(tmp_path, "online", HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    assert done.returncode == 0, done.stderr
    place = tmp_path / "cache/hub/models--org--model/snapshots" / COMMIT
    assert done.stdout.splitlines() == ["launch", *[str(place)] * 3]
    wanted = {file.name for file in place.iterdir()}
    assert wanted >= {"config.json", "model.safetensors", "tokenizer.json"}
    fetched = {
        path.rsplit("/", 1)[1]: count for (verb, path), count in requests.items() if verb == "GET" and "api" not in path
    }
    assert fetched == dict.fromkeys(wanted, 1)
    assert max(requests.values()) == 1, requests  # every other request is sent once too

    requests.clear()
    done = node(tmp_path, "offline", HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["launch", *[str(place)] * 3]
    assert not requests
