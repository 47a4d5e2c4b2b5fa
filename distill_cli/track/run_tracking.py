"""A run's trackers while it runs, and sending afterwards what could not be sent before (`distill track sync`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.report.read import read_results, state_of
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.base import Tracker, enabled, tracker_problems, trackers_of
from distill_cli.track.facts import attempt_tags
from distill_cli.track.shipper import Shipped, Shipper, reason, recorded, ship
from distill_cli.track.system import SystemSampler

END_S = 30.0
"""How long the end of a run waits for a tracker that answers."""
MODEL_S = 3600.0
"""The same if the tracker takes the trained model's files."""
STOPPED_S = 2.0
"""The same if the user or the system stops the run."""


@contextmanager
def tracking(resolved: ResolvedRun, run: RunDir) -> Iterator[None]:
    """Let the config's trackers follow the run's folder as long as the context lasts, and tell them how it ended."""
    if not enabled(resolved.config):
        yield
        return
    write_json(run.logs / "tags.json", attempt_tags(resolved, run))
    with following(run, trackers_of(resolved.config, run), use_gpus=resolved.ranks.on_gpus):
        yield


@contextmanager
def following(run: RunDir, trackers: Sequence[Tracker], *, use_gpus: bool = False) -> Iterator[None]:
    """Ship the run's folder to each of these; one that fails is a warning and leaves the others alone."""
    run.metrics.touch()
    sampler = SystemSampler(run.path / "system.jsonl", use_gpus=use_gpus)
    shippers = [Shipper(run, tracker) for tracker in trackers]
    write_json(run.trackers, {shipper.tracker.name: shipper.identity for shipper in shippers})
    status, timeout_s = "failed", END_S
    try:
        yield
        status = end_status(run)
    except Stopped:
        status, timeout_s = "stopped", STOPPED_S
        raise
    finally:
        sampler.close()
        for shipper in shippers:
            has_model = shipper.tracker.logs_model and status == "finished"
            shipper.end(status, timeout_s=MODEL_S if has_model else timeout_s)
        for shipper in shippers:
            shipper.wait()


def end_status(run: RunDir) -> str:
    """Return how a run ended, by its outcome.json."""
    return read_json(run.outcome)["state"] if run.outcome.exists() else "failed"


def track(paths: Sequence[Path], *, uri: str | None = None) -> int:
    """Send what trackers lack of these runs and sweeps; return 0.

    Raises:
        ConfigError: there is no such run or sweep, or the address is none.
        DistillError: a tracker did not take everything.
    """
    console = Console(highlight=False, soft_wrap=True)
    failed: dict[str, None] = {}
    for run in find_runs(paths):
        for tracker in trackers_of(recorded_config(run, uri=uri), run):
            try:
                sent, run_id = sync(run, tracker)
            except Exception as error:  # whatever a server or a database raises
                failed[f"{tracker.label} at {tracker.place}: {reason(error)}"] = None
                continue
            told = f"{sent.metrics} metrics, {sent.artifacts} files sent to {tracker.place}, run {run_id}"
            console.print(escape(f"{run.path}: {told}"))
    if failed:
        raise DistillError("; ".join(failed))
    return 0


def sync(run: RunDir, tracker: Tracker) -> tuple[Shipped, str]:
    """Send what the tracker lacks, and how the run ended if it has; return what was sent, and the tracker's run."""
    end = None
    if state_of(run) != "running":
        end = end_status(run) if run.outcome.exists() else recorded(run, tracker.name).get("end") or "failed"
    sent = ship(run, tracker, end=end)
    return sent, recorded(run, tracker.name)["run_id"]


def recorded_config(run: RunDir, *, uri: str | None) -> Config:
    """Return a run's config with the addresses that it was sent to; with the default trackers if it has none.

    Args:
        uri: another address, for trackers that have one.

    Raises:
        ConfigError: the address is none, or no tracker has one.
    """
    config = load_config(run.config)
    if not enabled(config):
        config = replace(config, tracker=compose([])[0].config.tracker)
    found = {name: one for name, one in enabled(config).items() if hasattr(one, "uri")}
    if uri is not None and not found:
        raise ConfigError(f"--uri={uri}: the trackers of {run.path} have no address; leave it out")
    for name, one in found.items():
        found[name] = replace(one, uri=recorded(run, name).get("uri", one.uri) if uri is None else uri)
    config = replace(config, tracker=replace(config.tracker, **found))
    if problems := tracker_problems(config):
        raise ConfigError(*problems)
    return config


def find_runs(paths: Sequence[Path]) -> list[RunDir]:
    """Return the runs that have begun. Raises ConfigError if there is none, or if a folder is neither run nor sweep."""
    runs = [run for result in read_results(paths) if (run := RunDir(result.folder)).metrics.exists()]
    if not runs:
        raise ConfigError(f"{', '.join(map(str, paths))}: no run has begun; give the folder of one that has")
    return runs
