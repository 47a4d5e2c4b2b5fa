"""Which file system a folder is on, and whether the nodes of a cluster see it."""

from pathlib import Path

import pytest

from distill_cli.launch.slurm_cluster import SlurmCluster, file_system

MOUNTS = {"/": "ext4", "/home": "nfs4", "/tmp": "tmpfs"}


@pytest.mark.parametrize(("path", "kind"), [("/home/me/runs", "nfs4"), ("/tmp/runs", "tmpfs"), ("/srv", "ext4")])
def test_longest_mount_point_holds_a_path(path: str, kind: str) -> None:
    assert file_system(Path(path), MOUNTS) == kind


def test_other_nodes_need_shared_disks() -> None:
    others, here = SlurmCluster(lambda *_: "NodeHostName=far NodeHostName=away"), SlurmCluster(lambda *_: "")
    assert "other nodes do not see" in others.unshared(Path("/srv/x"), None, MOUNTS)
    assert others.unshared(Path("/home/x"), None, MOUNTS) is None
    assert here.unshared(Path("/srv/x"), None, MOUNTS) is None
    assert others.unshared(Path("/srv/x"), ["/srv"], MOUNTS) is None
    assert "/scratch" in here.unshared(Path("/srv/x"), ["/scratch"], MOUNTS)


def test_this_machine_has_a_root() -> None:
    assert file_system(Path("/proc/self")) == "proc"
