"""What can be told of a cluster without one: folders, caches, time limits."""

from pathlib import Path

import pytest

from distill_cli.config.derived import parse_time_limit
from distill_cli.config.schema import ClusterConfig
from distill_cli.errors import ConfigError
from distill_cli.launch.local import environment
from distill_cli.launch.placement import placement
from distill_cli.launch.shared import file_system, unshared

MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
22 21 0:40 / /home rw - nfs4 server:/home rw
23 21 0:41 / /tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(("path", "kind"), [("/home/me/runs", "nfs4"), ("/tmp/runs", "tmpfs"), ("/srv", "ext4")])
def test_the_longest_mount_point_holds_a_path(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_a_disk_of_this_machine_is_refused_where_the_nodes_are_others() -> None:
    others, here = lambda: {"far", "away"}, lambda: set()
    assert "other nodes do not see" in unshared(Path("/srv/x"), shared_folders=None, node_hosts=others, mounts=MOUNTS)
    assert unshared(Path("/home/x"), shared_folders=None, node_hosts=others, mounts=MOUNTS) is None
    assert unshared(Path("/srv/x"), shared_folders=None, node_hosts=here, mounts=MOUNTS) is None
    assert unshared(Path("/srv/x"), shared_folders=["/srv"], node_hosts=others, mounts=MOUNTS) is None
    assert "/scratch" in unshared(Path("/srv/x"), shared_folders=["/scratch"], node_hosts=here, mounts=MOUNTS)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("60", 3600), ("1:30", 90), ("01:00:00", 3600), ("1-0", 86400), ("2-00:00:01", 172801), ("x", None), ("0", None)],
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: float | None) -> None:
    assert parse_time_limit(text) == seconds


def test_caches_go_where_the_cluster_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    cluster = ClusterConfig(
        hf_home="$NODE_DISK/hf", compile_cache="$NODE_DISK/c", tmp_dir="$NODE_DISK/t", env={"A": "1"}
    )
    env = environment(num_ranks=1, use_gpus=False, extra=placement(cluster))
    assert env["HF_HOME"] == f"{tmp_path}/hf"
    assert env["TMPDIR"] == f"{tmp_path}/t"
    assert env["A"] == "1"
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert env[name].startswith(f"{tmp_path}/c/")
    with pytest.raises(ConfigError, match=r"\$NO_SUCH is not set here"):
        placement(ClusterConfig(tmp_dir="${NO_SUCH}/x"))
