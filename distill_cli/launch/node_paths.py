"""Where the ranks of a node keep what they download, compile and throw away: `cluster.hf_home` and its neighbours."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from distill_cli.config.execution_schema import ClusterConfig
from distill_cli.config.schema import Config
from distill_cli.errors import ConfigError
from distill_cli.launch.base import launcher_of

COMPILE_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "/inductor", "TRITON_CACHE_DIR": "/triton", "VLLM_CACHE_ROOT": "/vllm"}
VARIABLES = {"hf_home": {"HF_HOME": ""}, "compile_cache": COMPILE_CACHES, "tmp_dir": {"TMPDIR": ""}}
"""Environment variables that each key of cluster.* sets, with the path inside the key's folder."""


def node_variables(cluster: ClusterConfig) -> dict[str, str]:
    """Return the environment variables that cluster.* sets for a run's processes; make the folders on this node.

    Raises:
        ConfigError: a folder names a variable that the node does not have, or cannot be made.
    """
    env = {str(name): str(value) for name, value in cluster.env.items()}
    for key, variables in VARIABLES.items():
        if (text := getattr(cluster, key)) is not None:
            folder = _make_folder(text, key)
            env |= {name: folder + part for name, part in variables.items()}
    return env


def use_hub_cache(config: Config) -> None:
    """Look for models and data in cluster.hf_home from now on; call before huggingface_hub is imported.

    Raises:
        ConfigError: ranks will start here, and the folder cannot be made. On a cluster only its nodes may have it.
    """
    if (folder := config.cluster.hf_home) is not None:
        with suppress(*(() if launcher_of(config.cluster.launcher).runs_here else (ConfigError,))):
            os.environ["HF_HOME"] = _make_folder(folder, "hf_home")


def _make_folder(text: str, key: str) -> str:
    path = Path(os.path.expandvars(text)).expanduser()
    if missing := re.search(r"\$\{?(\w+)", str(path)):
        raise ConfigError(f"cluster.{key}={text}: ${missing[1]} is not set here; set it, or name a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"no folder can be made there ({error.strerror})"
        raise ConfigError(f"cluster.{key}={text}: {what}; choose another") from error
    return str(path.absolute())
