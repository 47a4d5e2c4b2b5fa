"""Run a run's trackers while it lasts, and send afterwards what they missed (`distill track sync`)."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from rich.markup import escape

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.variation import load_config, override
from distill_cli.errors import ConfigError, DistillError, Stopped, refuse
from distill_cli.folders.run_dir import RunDir, read_json, write_json
from distill_cli.report.read import read_results, state_of
from distill_cli.resolved import ResolvedRun
from distill_cli.terminal.console import Console
from distill_cli.track.base import Tracker, enabled, tracker_class, tracker_problems, trackers_of
from distill_cli.track.facts import attempt_tags
from distill_cli.track.shipper import Shipper, reason, recorded, ship
from distill_cli.track.system import SystemSampler

END_S = 30.0
"""How long the end of a run waits for a tracker that answers."""
MODEL_S = 3600.0
"""The same if the tracker receives the trained model's files."""
STOPPED_S = 2.0
"""The same if the user or the system stops the run."""


def tracking(resolved: ResolvedRun, run: RunDir) -> AbstractContextManager[None]:
    """Ship the run's folder to the config's trackers during the context, and then how the run ended."""
    trackers = trackers_of(resolved.config, run)
    if not trackers:
        return nullcontext()
    write_json(run.logs / "tags.json", attempt_tags(resolved, run))
    return following(run, trackers, use_gpus=resolved.ranks.on_gpus)


@contextmanager
def following(run: RunDir, trackers: Sequence[Tracker], *, use_gpus: bool = False) -> Iterator[None]:
    """Ship the run's folder to each tracker; the failure of one is a warning and does not affect the others."""
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


def end_status(run: RunDir, default: str = "failed") -> str:
    """Return how a run ended, by its outcome.json; `default` without one."""
    return read_json(run.outcome)["state"] if run.outcome.exists() else default


def track(paths: Sequence[Path], *, uri: str | None = None, overrides: Sequence[str] = ()) -> int:
    """Send what trackers lack of these runs and sweeps, and how each run ended if it has; return 0.

    Args:
        uri: another address than the recorded one.
        overrides: of tracker keys: another tracker, project and so on.

    Raises:
        ConfigError: there is no such run or sweep, none of the runs has begun, or an override or the address is wrong.
        DistillError: a tracker did not receive everything.
    """
    console, failed = Console(highlight=False, soft_wrap=True), dict[str, None]()
    runs = [run for result in read_results(paths) if (run := RunDir(result.folder)).metrics.exists()]
    if not runs:
        raise ConfigError(f"{', '.join(map(str, paths))}: no run has begun; give the folder of one that has")
    for run in runs:
        for tracker in trackers_of(recorded_config(run, uri=uri, overrides=overrides), run):
            is_running, known = state_of(run) == "running", recorded(run, tracker.name)
            if is_running and tracker.has_one_sender:
                console.print(escape(f"{run.path}: is running; send it to {tracker.label} when it has ended"))
                continue
            try:
                end = None if is_running else end_status(run, known.get("end") or "failed")
                num_metrics, num_files = ship(run, tracker, end=end)
            except Exception as error:  # whatever a server or a database raises
                failed[f"{tracker.label} at {tracker.place}: {reason(error)}"] = None
                continue
            run_id = recorded(run, tracker.name).get("run_id")
            to = tracker.place + (f", run {run_id}" if run_id else "")
            console.print(escape(f"{run.path}: {num_metrics} metrics, {num_files} files sent to {to}"))
    if failed:
        raise DistillError("; ".join(failed))
    return 0


def recorded_config(run: RunDir, *, uri: str | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return a run's config with the places that it was sent to, and the default trackers if it has none.

    Raises:
        ConfigError: an override is wrong or no tracker's, or the address is not valid or not that of one tracker.
    """
    keys = [word.lstrip("+").partition("=")[0] for word in overrides]
    refuse(f"{key}: track sync takes keys of trackers alone" for key in keys if key.partition(".")[0] != "tracker")
    config = override(load_config(run.config), overrides, typed=run.typed_overrides())
    if not enabled(config):
        config = replace(config, tracker=compose(overrides)[0].config.tracker)
    addressed = [name for name, settings in enabled(config).items() if hasattr(settings, "uri")]
    if uri is not None and len(addressed) != 1:
        several = f"several trackers have an address; add one of {', '.join(f'tracker={one}' for one in addressed)}"
        none = f"the trackers of {run.path} have no address; leave it out"
        raise ConfigError(f"--uri={uri}: {several if addressed else none}")
    for name, settings in enabled(config).items():
        known = {**recorded(run, name), **tracker_class(name).afterwards}
        places = {f"tracker.{name}.{key}": known[key] for key in asdict(settings) if key in known}
        config = override(config, {key: value for key, value in places.items() if key not in keys})
    if uri is not None:
        config = override(config, {f"tracker.{addressed[0]}.uri": uri})
    refuse(tracker_problems(config))
    return config
