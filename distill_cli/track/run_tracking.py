"""What MLflow is told about a run, and what `distill track sync` does: it sends what could not be sent before.

All of it is read from the run's folder, so that it can be told on another day and from another machine.
"""

from __future__ import annotations

import getpass
import json
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.markup import escape

from distill_cli.checkpoint import store
from distill_cli.config.credentials import whole_uri
from distill_cli.config.schema import Config, MeshConfig
from distill_cli.config.variation import flatten, load_config
from distill_cli.data.registry import load_examples
from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.folders.run_dir import RunDir, SweepDir, write_json
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.machine import hardware
from distill_cli.report.read import state_of
from distill_cli.terminal.console import Console
from distill_cli.track import mlflow
from distill_cli.track.inputs import DatasetSource
from distill_cli.track.mlflow import MlflowShipper, MlflowTarget, Shipped
from distill_cli.track.system import SystemSampler

MODEL_TIMEOUT_S = 3600.0
"""How long a server that takes it may take for a trained model's files."""


@contextmanager
def tracking(config: Config, run: RunDir) -> Iterator[None]:
    """MLflow follows the run's folder as long as the context lasts, and learns how it ended."""
    if not config.tracker.mlflow.enabled:
        yield
        return
    run.metrics.touch()
    find_again(run)
    write_json(run.logs / "tags.json", attempt_tags(config, run))
    sampler = SystemSampler(run.path / "system.jsonl", use_gpus=hardware.gpus_per_node(config) > 0)
    shipper = MlflowShipper(run, target := mlflow_target(config, run))
    status, timeout_s = "FAILED", 30.0
    try:
        yield
        status, timeout_s = end_status(run), MODEL_TIMEOUT_S if target.log_model else timeout_s
    except Stopped:
        status, timeout_s = "KILLED", 2.0  # who stops a run waits for no server
        raise
    finally:
        sampler.close()
        shipper.close(status=status, timeout_s=timeout_s)


def find_again(run: RunDir) -> None:
    """Where the folder has lost its mlflow.json, the newest checkpoint says which of MLflow's runs it goes on with."""
    known = [checkpoint.state.get("mlflow") for checkpoint in store.find(run.checkpoints)[-1:]]
    if any(known) and not (run.path / "mlflow.json").exists():
        write_json(run.path / "mlflow.json", known[0])


def end_status(run: RunDir) -> str:
    """MLflow's word for how a run ended, by its outcome.json."""
    states = {"finished": "FINISHED", "stopped": "KILLED"}
    return states.get(json.loads(run.outcome.read_text())["state"], "FAILED") if run.outcome.exists() else "FAILED"


def mlflow_target(config: Config, run: RunDir, *, uri: str | None = None) -> MlflowTarget:
    """Everything that MLflow is told about a run beside its metrics and files.

    Args:
        uri: another address than the one that the config or the environment names.
    """
    settings, root = config.tracker.mlflow, Path(config.run.root).absolute()
    sweep = SweepDir(run.path.parent)
    sources = {"training": config.data.train, "validation": config.data.validation}
    return MlflowTarget(
        uri=uri or mlflow_uri(config),
        experiment=settings.experiment,
        run_name=settings.run_name or run.path.name,
        artifacts=root / "mlartifacts",
        params=flatten(OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)),
        tags=tags(config, run),
        datasets=[_dataset(context, spec) for context, spec in sources.items() if spec],
        models=_models(config),
        log_model=settings.log_model,
        sweep=sweep if sweep.file.is_file() else None,
    )


def mlflow_uri(config: Config) -> str:
    """The address, with its credentials: the config's, MLFLOW_TRACKING_URI, or a file beside the runs."""
    store = (Path(config.run.root) / "mlflow.db").absolute()
    return whole_uri(config.tracker.mlflow.uri) or f"sqlite:///{store}"


def _dataset(context: str, spec: dict[str, Any]) -> DatasetSource:
    key = "data.train" if context == "training" else "data.validation"
    return DatasetSource(context, spec, load=lambda: load_examples(spec, key=key))


def _models(config: Config) -> dict[str, str]:
    model = config.model
    return {
        role: side.path + (f"@{side.revision}" if side.revision else "")
        for role, side in (("student", model.student), ("teacher", model.teacher))
    }


def tags(config: Config, run: RunDir) -> dict[str, str]:
    """From env.json and what the newest attempt left: commits, versions, host, job, mesh."""
    file = run.path / "env.json"
    env = json.loads(file.read_text()) if file.exists() else {}
    found = {"distill.run_dir": str(run.path), "mlflow.source.name": "distill", "mlflow.source.type": "LOCAL"}
    found |= {f"model.{role}": path for role, path in _models(config).items()}
    found |= {f"versions.{name}": version for name, version in env.get("packages", {}).items()}
    found |= {f"versions.{name}": env[name] for name in ("python",) if name in env}
    git = env.get("git") or {}
    if git:
        found |= {"mlflow.source.git.commit": git["commit"], "mlflow.source.git.dirty": str(git["dirty"]).lower()}
    if env.get("distill_git"):
        found["distill.commit"] = env["distill_git"]["commit"]
    newest = max(run.path.glob("logs/attempt_*/tags.json"), key=lambda path: path.stat().st_mtime, default=None)
    return found | (json.loads(newest.read_text()) if newest else {})


def attempt_tags(config: Config, run: RunDir) -> dict[str, str]:
    """What may be another for each attempt: host, job, mesh."""
    ranks = hardware.ranks_per_node(config) * config.cluster.nodes
    found = {
        "host": platform.node(),
        "attempt": str(run.attempt),
        "mesh": mesh_text(config.mesh, ranks),
        "mlflow.user": getpass.getuser(),
    }
    for job in (launcher_of(name).tags() for name in LAUNCHERS):
        found |= job | ({"mlflow.source.type": "JOB"} if job else {})
    return found


def mesh_text(mesh: MeshConfig, ranks: int) -> str:
    """`8 ranks: replicate 2 x shard 2 x tensor 2`"""
    sizes = {"replicate": mesh.replicate, "shard": ranks // (mesh.replicate * mesh.context * mesh.tensor)}
    sizes |= {"context": mesh.context, "tensor": mesh.tensor}
    axes = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return f"{ranks} rank{'s' * (ranks > 1)}" + (": " + " x ".join(axes) if axes else "")


def track(paths: Sequence[Path], *, uri: str | None = None) -> int:
    """What `distill track sync` does; the exit status.

    Raises:
        ConfigError: no such run or sweep.
        DistillError: MLflow does not take it.
    """
    console = Console(highlight=False, soft_wrap=True)
    for run in find_runs(paths):
        config = load_config(run.config)
        run.metrics.touch()
        find_again(run)
        target = mlflow_target(config, run, uri=uri or recorded_uri(run))
        sent, run_id = sync(run, target)
        console.print(
            escape(
                f"{run.path}: {sent.metrics} metrics, {sent.artifacts} files sent to {target.shown_uri}, run {run_id}"
            )
        )
    return 0


def sync(run: RunDir, target: MlflowTarget) -> tuple[Shipped, str]:
    """Sends what is missing, and how the run ended if it has."""
    state = mlflow.State.of(run, target)
    end = None
    if state_of(run) != "running":
        end = end_status(run) if run.outcome.exists() else state.end or "FAILED"
    try:
        sent = mlflow.ship(run, target, end=end)
    except Exception as error:  # whatever a server or a database raises
        raise DistillError(f"MLflow at {target.shown_uri}: {mlflow.reason(error)}") from error
    return sent, str(mlflow.State.of(run, target).run_id)


def recorded_uri(run: RunDir) -> str | None:
    """Where the run was being sent when it ran."""
    file = run.path / "mlflow.json"
    return whole_uri(json.loads(file.read_text()).get("uri")) if file.exists() else None


def find_runs(paths: Sequence[Path]) -> list[RunDir]:
    """Every run that has begun, of folders of runs or sweeps."""
    found: list[RunDir] = []
    for path in paths:
        sweep, run = SweepDir(path.resolve()), RunDir(path.resolve())
        if sweep.file.is_file():
            runs = [RunDir(sweep.path / element.folder) for element in sweep.elements()]
            found += [run for run in runs if run.metrics.exists()]
        elif run.config.is_file():
            found.append(run)
        else:
            what = "no such folder" if not path.exists() else "neither a run (config.yaml) nor a sweep (sweep.json)"
            raise ConfigError(f"{path}: {what}; give the folder of a run or a sweep, such as runs/latest")
    return found
