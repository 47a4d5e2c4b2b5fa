"""Weights & Biases: its service, a server of your own, or a folder (offline). A sweep is a group of its runs.

W&B's library runs in a process of its own (`wandb_process`), which this one ends if it does not answer in time.

The library queues rows: how many have arrived when a process is killed is unknown. So each connection has a name, which
is part of the run's identity. Unless the last one was closed, the next one queries the last step that the server has,
and sends the rest. Offline there is no server to query, and each connection writes the run again, from its beginning.
"""

import configparser
import netrc
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from distill_cli.config.credentials import without_credentials
from distill_cli.config.execution_schema import WandbConfig, WandbMode
from distill_cli.config.schema import Config
from distill_cli.errors import DistillError
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, SweepDir, read_json
from distill_cli.machine.child_process import start_child
from distill_cli.machine.findings import Finding, missing_extra, optional_package, unreachable
from distill_cli.machine.processes import describe_exit
from distill_cli.track.base import Tracker
from distill_cli.track.facts import run_tags
from distill_cli.track.shipper import recorded

DEFAULT_URI = "https://api.wandb.ai"
MODES = {"online": True, "run": True, "offline": False, "dryrun": False}
"""Values of WANDB_MODE, and whether they send."""
EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 255}
"""W&B shows 255 as killed."""
ENVIRONMENT = {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}
REMOVED = ("RUN_ID", "RESUME", "MODE", "DIR", "SERVICE", "SWEEP_ID", "SWEEP_PARAM_PATH", "LAUNCH", "CONFIG_PATHS")
"""W&B's environment variables that would make another run of this one."""
OPEN_S, CALL_S, CLOSE_S, CLOSE_MODEL_S = 60.0, 30.0, 300.0, 3600.0
"""How long the process may take to connect, to take rows or a file, and to send the rest, with or without a model."""


class WandbTracker(Tracker):
    name = "wandb"
    label = "W&B"
    streams = ("metrics.jsonl",)  # W&B samples the machine's load itself
    has_one_sender = True
    afterwards = {"mode": WandbMode.online}  # noqa: RUF012

    def __init__(self, settings: WandbConfig, config: Config, run: RunDir) -> None:
        self._settings, self._config, self._run = settings, config, run
        self._uri, self._folder, self._sends = base_uri(settings), run.path / "wandb", is_online(settings)
        self.place = self._uri if self._sends else str(self._folder)
        sync = shlex.join(["distill", "track", "sync", str(run.path)])
        self.page = recorded(run, self.name).get("url") or self.place if self._sends else f"{sync} (offline so far)"
        self.logs_model = settings.log_model
        self._process: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._connection: str | None = None
        self._is_live = False
        self._next_step = 0

    def identity(self, known: Mapping[str, Any]) -> dict[str, Any]:
        if self._connection is None:
            is_whole = self._sends and known.get("is_closed")
            self._connection = known.get("connection") if is_whole else uuid.uuid4().hex
        place = {"uri": self._uri, "project": project_of(self._settings), "is_online": self._sends}
        entity = self._settings.entity or os.environ.get("WANDB_ENTITY") or None
        run = {"run_id": known.get("run_id") or uuid.uuid4().hex[:12], "url": known.get("url")}
        return {**place, "entity": entity, **run, "connection": self._connection}

    def open(self, identity: dict[str, Any], *, running: bool) -> None:
        if self._process is not None:
            return
        arguments, self._is_live = self._init_arguments(identity), self._is_live or running
        shutil.rmtree(self._folder, ignore_errors=True)  # what an earlier connection left: this one sends it again
        environ = {**os.environ, **ENVIRONMENT, "WANDB_BASE_URL": self._uri}
        for name in REMOVED:
            environ.pop(f"WANDB_{name}", None)
        self._process = start_child("distill_cli.track.wandb_process", environ, output=subprocess.DEVNULL)
        opened = self._call("open", arguments, self._is_live, timeout_s=OPEN_S)
        self._next_step, identity["url"] = opened["next_step"], opened["url"]

    def _init_arguments(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        settings, sweep = self._settings, SweepDir(self._run.path.parent)
        config = yaml.safe_load(self._run.config.read_text())
        facts = {name.replace(".", "_"): value for name, value in run_tags(self._config, self._run).items()}
        return {
            "id": identity["run_id"],
            "project": identity["project"],
            "entity": identity["entity"],
            "group": settings.group or (sweep.path.name if sweep.file.is_file() else None),
            "name": settings.run_name or self._run.path.name,
            "tags": settings.tags or None,
            "notes": settings.notes,
            "mode": "online" if self._sends else "offline",
            "resume": "allow" if self._sends else None,
            "config": {**config, "facts": facts},
            "dir": str(self._run.path),
        }

    def logged(self) -> set[tuple[str, int]]:
        """Return all up to the last step that the server has: W&B's rows are in order, and each is whole."""
        rows = (row for row in read_metrics(self._run.metrics) if row["step"] < self._next_step)
        found = {(key, int(row["step"])) for row in rows for key in row if key not in ("step", "time")}
        return found | {("_step", self._next_step - 1)}  # a run that went back has fewer rows than the server

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        self._call("log", [dict(row) for row in rows], timeout_s=CALL_S)

    def artifact(self, file: Path, name: str) -> None:
        self._call("save", str(file), str(self._run.path.parent), timeout_s=CALL_S)

    def close(self, status: str) -> None:
        if self._process is None:
            return
        summary = {"outcome": read_json(self._run.outcome)} if self._run.outcome.exists() else {}
        timeout_s = CLOSE_MODEL_S if self.logs_model else CLOSE_S
        self._call("close", summary, EXIT_CODES.get(status, 1), timeout_s=timeout_s)
        self._end()

    def _call(self, name: str, *arguments: Any, timeout_s: float) -> Any:
        """Return the result of a call in W&B's process.

        Raises:
            DistillError: it failed; or the process died or did not answer in time. Then it is ended, and the next
                `open` connects anew.
        """
        assert self._process is not None, "opened"
        _, connection = self._process
        try:
            connection.send((name, arguments))
            if not connection.poll(timeout_s):
                raise DistillError(f"no answer for {timeout_s:g} s ({name})")
            error, result = connection.recv()
        except BaseException as failure:
            status = self._end()
            if isinstance(failure, EOFError | OSError):
                raise DistillError(f"W&B's process {describe_exit(status)}") from failure
            raise
        if error is not None:
            if name in ("open", "close"):
                self._end()
            raise DistillError(error)
        return result

    def _end(self) -> int:
        """End W&B's process; return its exit status, negative for a signal."""
        assert self._process is not None, "opened"
        process, connection = self._process
        connection.close()
        process.kill()
        self._process = self._connection = None
        return process.wait()

    @classmethod
    def problems(cls, settings: WandbConfig) -> Iterator[str]:
        yield from missing_extra("wandb")
        uri, project = base_uri(settings), project_of(settings)
        if urlsplit(uri).scheme not in ("http", "https") or without_credentials(uri) != uri:
            yield "uri: must be an address such as https://wandb.example.com, without a password: W&B takes an API key"
        if not 1 <= len(project) <= 128 or set(project) & set("/\\#?%:"):
            yield f"project={project}: must have 1 to 128 characters, and none of / \\ # ? % :"
        if any(not 1 <= len(tag) <= 64 for tag in settings.tags) or len(set(settings.tags)) < len(settings.tags):
            yield "tags: each must be another one, of 1 to 64 characters"
        mode = os.environ.get("WANDB_MODE") or "online"
        if settings.mode is None and mode not in MODES:
            fix = "unset it, set tracker.wandb.mode=online or offline, or leave this tracker out"
            yield f"mode: WANDB_MODE={mode} in your environment turns W&B off or is unknown; {fix}"
        elif is_online(settings) and not has_key(uri):
            fix = "type `wandb login`, export WANDB_API_KEY, or set tracker.wandb.mode=offline"
            yield f"mode: online needs an API key for {without_credentials(uri)}; {fix}"

    @classmethod
    def doctor(cls) -> list[Finding]:
        found, uri = [optional_package("wandb")], base_uri(WandbConfig())
        if not list(missing_extra("wandb")) and has_key(uri):
            reason = unreachable(f"{uri.rstrip('/')}/healthz")
            fix = "runs go on without it; distill track sync RUN sends the rest"
            detail = f"{without_credentials(uri)} {reason or 'answers, and there is an API key for it'}"
            found.append(Finding("wandb server", reason is None, detail, fix, needed=False))
        return found


TRACKER = WandbTracker


def is_online(settings: WandbConfig) -> bool:
    """Return whether runs are sent while they last."""
    if settings.mode is not None:
        return settings.mode is WandbMode.online
    return MODES.get(os.environ.get("WANDB_MODE") or "online", True)


def base_uri(settings: WandbConfig) -> str:
    """Return the address of the server, from the config, the environment, or what `wandb login` wrote."""
    return settings.uri or os.environ.get("WANDB_BASE_URL") or own_settings().get("base_url") or DEFAULT_URI


def project_of(settings: WandbConfig) -> str:
    return settings.project or os.environ.get("WANDB_PROJECT") or "distill"


def own_settings() -> Mapping[str, str]:
    """Return what W&B's own settings files say, which `wandb login` and `wandb init` write."""
    folder = os.path.expanduser(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    parser = configparser.ConfigParser(interpolation=None)
    with suppress(configparser.Error, UnicodeDecodeError):
        parser.read([f"{folder}/settings", "wandb/settings"])
    return dict(parser["default"]) if "default" in parser else {}


def has_key(uri: str) -> bool:
    """Return whether there is an API key for a server where W&B looks for one, without reading it."""
    if any(os.environ.get(f"WANDB_{name}") for name in ("API_KEY", "IDENTITY_TOKEN_FILE")):
        return True
    if not {"api_key", "identity_token_file"}.isdisjoint(own_settings()):
        return True
    files = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for file in (os.path.expanduser(name) for name in files if name):
        with suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if urlsplit(uri).hostname in netrc.netrc(file).hosts:
                return True
    return False
