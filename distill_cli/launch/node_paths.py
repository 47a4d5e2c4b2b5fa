"""Where the ranks of a node keep what they download, compile and throw away: `cluster.hf_home` and its neighbours."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.errors import ConfigError
from distill_cli.launch.base import launcher_of


def node_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that cluster.* sets for a run's processes; make the folders on this node.

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


def use_hub_cache(cluster: ClusterConfig) -> None:
    """Look for models in cluster.hf_home from now on; call before huggingface_hub is imported.

    Raises:
        ConfigError: ranks will start here, and the folder cannot be made. It may be one that only nodes have otherwise.
    """
    if cluster.hf_home is None:
        return
    with suppress(*(() if launcher_of(cluster.launcher).runs_here else (ConfigError,))):
        os.environ["HF_HOME"] = _folder(cluster.hf_home, "hf_home")


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
