"""A server that W&B's own client sends runs to: the part of W&B's interface that it needs, kept in memory."""

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote


@dataclass
class StoredRun:
    """What the server has of a run."""

    name: str
    group: str | None
    tags: list[str]
    notes: str | None
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def history(self, key: str) -> list[tuple[int, float]]:
        return [(row["_step"], row[key]) for row in self.rows if key in row]

    def values(self) -> list[tuple[str, int, float]]:
        """Every metric but W&B's own, with step and value."""
        return [(key, row["_step"], value) for row in self.rows for key, value in row.items() if key[0] != "_"]


class WandbServer(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.runs: dict[str, StoredRun] = {}
        self.refuses = threading.Event()
        """Answer every request with status 500."""
        self.silent = threading.Event()
        """Accept requests and never answer."""
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about clients that were killed in the middle of a request."""


@contextmanager
def wandb_server(port: int = 0) -> Iterator[WandbServer]:
    server = WandbServer(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:
        body = self._body()
        _, run, name = self.path.lstrip("/").split("/", 2)
        self.server.runs[run].files[unquote(name)] = body
        self._answer({})

    def do_POST(self) -> None:
        body = json.loads(self._body())
        if self.server.silent.is_set():
            self.server.ended.wait()
        if self.server.refuses.is_set() or self.server.ended.is_set():
            self.send_error(500)
        elif self.path == "/graphql":
            operation = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            answer = getattr(self, str(operation and operation[1]), lambda **_: {})
            self._answer({"data": answer(**body.get("variables", {}))})
        else:  # /files/<entity>/<project>/<run>/file_stream
            self._answer(self.file_stream(self.server.runs[self.path.split("/")[4]], body))

    def file_stream(self, run: StoredRun, body: dict[str, Any]) -> dict[str, Any]:
        for name, part in body.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"] if name.endswith((".jsonl", ".json"))]
            if name == "wandb-history.jsonl":
                run.rows[part["offset"] :] = lines
            elif name == "wandb-summary.json":
                run.summary = lines[-1]
        if body.get("complete"):
            run.exit_code = body["exitcode"]
        return {"exitcode": None, "limits": {}}

    def Viewer(self, **_: Any) -> dict[str, Any]:
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "email": "me@x", "flags": "{}", "teams": None}}

    def ServerInfo(self, **_: Any) -> dict[str, Any]:
        return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "9.9.9"}, "latestLocalVersionInfo": None}}

    def ServerFeaturesQuery(self, **_: Any) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def RunStoppedStatus(self, **_: Any) -> dict[str, Any]:
        return {"project": {"run": {"stopped": True}}}  # someone clicked on "stop": no tracker stops a run

    def RunResumeStatus(self, name: str, **_: Any) -> dict[str, Any]:
        run = self.server.runs.get(name)
        if run is None:
            return {"model": None}
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.name,
            "config": json.dumps(run.config),
            "summaryMetrics": json.dumps(run.summary),
            "historyLineCount": len(run.rows),
            "historyTail": json.dumps([json.dumps(row) for row in run.rows[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "tags": run.tags,
            "notes": run.notes,
            "wandbConfig": json.dumps({"t": 1}),
        }
        return {"model": {"id": "p", "name": "p", "entity": {"id": "me", "name": "me"}, "bucket": bucket}}

    def UpsertBucket(self, name: str, **given: Any) -> dict[str, Any]:
        is_new = name not in self.server.runs
        run = self.server.runs.setdefault(name, StoredRun(given.get("displayName") or name, None, [], None))
        run.group, run.tags = given.get("groupName") or run.group, given.get("tags") or run.tags
        run.notes = given.get("notes") or run.notes
        if given.get("config"):
            run.config = json.loads(given["config"])
        run.exit_code = None
        project = {"id": "p", "name": given.get("project") or "p", "entity": {"id": "me", "name": "me"}}
        bucket = {"id": name, "name": name, "displayName": run.name, "description": None, "config": None}
        bucket |= {"sweepName": None, "project": project, "historyLineCount": len(run.rows)}
        return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}

    def CreateRunFiles(self, run: str, files: list[str], **_: Any) -> dict[str, Any]:
        urls = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{run}/{quote(name)}"} for name in files]
        return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": urls}}

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
