"""Which file system a folder is on, and whether the nodes of a cluster see it."""

from pathlib import Path

import pytest

from distill_cli.launch.slurm_cluster import file_system, unshared

MOUNTS = {"/": "ext4", "/home": "nfs4", "/tmp": "tmpfs"}


@pytest.mark.parametrize(("path", "kind"), [("/home/me/runs", "nfs4"), ("/tmp/runs", "tmpfs"), ("/srv", "ext4")])
def test_longest_mount_point_holds_a_path(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_other_nodes_need_shared_disks() -> None:
    others, here = lambda: {"far", "away"}, lambda: set()
    assert "other nodes do not see" in unshared(Path("/srv/x"), shared_folders=None, node_hosts=others, mounts=MOUNTS)
    assert unshared(Path("/home/x"), shared_folders=None, node_hosts=others, mounts=MOUNTS) is None
    assert unshared(Path("/srv/x"), shared_folders=None, node_hosts=here, mounts=MOUNTS) is None
    assert unshared(Path("/srv/x"), shared_folders=["/srv"], node_hosts=others, mounts=MOUNTS) is None
    assert "/scratch" in unshared(Path("/srv/x"), shared_folders=["/scratch"], node_hosts=here, mounts=MOUNTS)


def test_this_machine_has_a_root() -> None:
    assert file_system(Path("/proc/self")) == "proc"
