"""What trackers show of a run in addition to its metrics and files.

All of it is read from the run's folder, so that it can be sent later and from another machine.
"""

import getpass
import hashlib
import logging
import platform
from collections.abc import Iterable, Mapping
from typing import Any

from distill_cli.config.schema import Config, MeshConfig
from distill_cli.config.teachers import ONLY, teacher_configs
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream
from distill_cli.folders.run_dir import RunDir, read_json
from distill_cli.launch.base import LAUNCHERS, launcher_of
from distill_cli.resolved import ResolvedRun

log = logging.getLogger(__name__)


def models(config: Config) -> dict[str, str]:
    """Return path and revision of each role's model."""
    student = config.model.student
    found = {"student": student.path + (f"@{student.revision}" if student.revision else "")}
    for name, one in teacher_configs(config).items():
        found[name if name == ONLY else f"teacher.{name}"] = one.model.teacher.shown
    return found


def data_profile(spec: Mapping[str, Any], *, key: str) -> tuple[str, dict[str, int]]:
    """Return a digest of a data source's rows, 36 characters, and their number; of its keys if it is unreadable."""
    rows: Iterable[Any] = [dict(spec)]
    profile: dict[str, int] = {}
    try:
        loaded = load_examples(dict(spec), key=key)
        if not isinstance(loaded, Stream):  # which may be endless
            rows, profile = loaded, {"num_rows": len(loaded)}
    except Exception as error:
        log.warning("%s cannot be read, so its digest is that of its keys: %s", key, error)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode())
    return digest.hexdigest()[:36], profile


def run_tags(config: Config, run: RunDir) -> dict[str, str]:
    """Return commits, versions, host, job and mesh, from env.json and the newest attempt's tags.json."""
    env = read_json(run.path / "env.json") if (run.path / "env.json").exists() else {}
    found = {"distill.run_dir": str(run.path)} | {f"model.{role}": path for role, path in models(config).items()}
    versions = env.get("packages", {}) | ({"python": env["python"]} if "python" in env else {})
    found |= {f"versions.{name}": version for name, version in versions.items()}
    if git := env.get("git"):
        found |= {"git.commit": git["commit"], "git.dirty": str(git["dirty"]).lower()}
    if env.get("distill_git"):
        found["distill.commit"] = env["distill_git"]["commit"]
    newest = max(run.path.glob("logs/attempt_*/tags.json"), key=lambda path: path.stat().st_mtime, default=None)
    return found | (read_json(newest) if newest else {})


def attempt_tags(resolved: ResolvedRun, run: RunDir) -> dict[str, str]:
    """Return the tags that may differ between attempts: host, job, mesh."""
    mesh = mesh_text(resolved.config.mesh, resolved.ranks.trainers)
    found = {"host": platform.node(), "user": getpass.getuser(), "attempt": str(run.attempt), "mesh": mesh}
    for name in LAUNCHERS:
        found |= launcher_of(name).tags()
    return found


def mesh_text(mesh: MeshConfig, ranks: int) -> str:
    """Return, for example, `8 ranks: replicate 2 x shard 2 x tensor 2`."""
    sizes = {"replicate": mesh.replicate, "shard": ranks // (mesh.replicate * mesh.context * mesh.tensor)}
    sizes |= {"expert": mesh.expert, "context": mesh.context, "tensor": mesh.tensor}
    axes = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return f"{ranks} rank{'s' * (ranks > 1)}" + (": " + " x ".join(axes) if axes else "")
