"""Where the ranks of a node keep what they download, compile and throw away: `cluster.hf_home` and its neighbours."""

from __future__ import annotations

import os
import re
from pathlib import Path

from distill_cli.config.schema import ClusterConfig, Launcher
from distill_cli.errors import ConfigError


def placement(cluster: ClusterConfig) -> dict[str, str]:
    """The variables that a run's processes get, on the node where this is called; folders are made.

    Raises:
        ConfigError: a folder names a variable that the node does not have, or cannot be made.
    """
    env = {str(name): str(value) for name, value in cluster.env.items()}
    if cluster.hf_home is not None:
        env["HF_HOME"] = _folder(cluster.hf_home, "hf_home")
    if cluster.compile_cache is not None:
        folder = _folder(cluster.compile_cache, "compile_cache")
        for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            env[name] = f"{folder}/{part}"
        env["VLLM_CACHE_ROOT"] = f"{folder}/vllm"
    if cluster.tmp_dir is not None:
        env["TMPDIR"] = _folder(cluster.tmp_dir, "tmp_dir")
    return env


def hub_cache(cluster: ClusterConfig) -> dict[str, str]:
    """HF_HOME as this machine sees it, for what is looked at before ranks start; {} where only the nodes have it."""
    try:
        return {"HF_HOME": _folder(cluster.hf_home, "hf_home")} if cluster.hf_home is not None else {}
    except ConfigError:
        if cluster.launcher is Launcher.local:
            raise
        return {}


def _folder(text: str, key: str) -> str:
    path = os.path.expanduser(os.path.expandvars(text))
    if missing := re.search(r"\$\{?\w+", path):
        raise ConfigError(
            f"cluster.{key}={text}: {missing[0].replace('{', '')} is not set here; set it, or name a folder"
        )
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cluster.{key}={text}: no folder can be made there ({error.strerror}); choose another"
        ) from error
    return str(Path(path).absolute())
