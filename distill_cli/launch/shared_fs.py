"""Whether the nodes of a cluster see a folder: a guess by file system, which cluster.slurm.shared_folders replaces."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import psutil

LOCAL_FILE_SYSTEMS = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "vfat"),
    *("tmpfs", "ramfs", "overlay", "squashfs"),
}
"""Visible on one machine alone, unless it exports them."""


def unshared(
    folder: Path,
    *,
    shared_folders: Sequence[str] | None,
    node_hosts: Callable[[], Set[str]],
    mounts: Mapping[str, str] | None = None,
) -> str | None:
    """Return why the nodes will not see what is written under `folder`, as a problem of run.root; None if they should.

    Args:
        shared_folders: folders that all nodes see; None decides by the file system's type.
        node_hosts: returns the host names of the nodes' machines.
        mounts: type by mount point; None reads this machine's.
    """
    path = folder.absolute().resolve()
    if shared_folders is not None:
        if any(path.is_relative_to(Path(os.path.expandvars(shared)).resolve()) for shared in shared_folders):
            return None
        listed = f"cluster.slurm.shared_folders: {', '.join(shared_folders) or 'none'}"
        return f"run.root={folder}: not in a folder that all nodes see ({listed}); choose another run.root"
    kind = file_system(path, mounts)
    if kind not in LOCAL_FILE_SYSTEMS or node_hosts() <= {platform.node().split(".")[0], platform.node()}:
        return None
    what = f"on a {kind} file system of this machine, which other nodes do not see"
    return f"run.root={folder}: {what}; choose a shared one, or name it in cluster.slurm.shared_folders if they do"


def file_system(path: Path, mounts: Mapping[str, str] | None = None) -> str:
    """Return the type of the file system that holds `path`: that of the longest mount point above it."""
    if mounts is None:  # the last mount at a point is the one on top
        mounts = {mount.mountpoint: mount.fstype for mount in psutil.disk_partitions(all=True)}
    return next(mounts[str(folder)] for folder in (path, *path.parents) if str(folder) in mounts)
