"""Whether the nodes of a cluster see a folder: a guess that the site can replace by its knowledge."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence, Set
from pathlib import Path

LOCAL_FILE_SYSTEMS = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "reiserfs", "bcachefs", "vfat"),
    *("tmpfs", "ramfs", "overlay", "squashfs"),
}
"""What one machine alone has, unless it exports it."""


def unshared(
    folder: Path,
    *,
    shared_folders: Sequence[str] | None,
    node_hosts: Callable[[], Set[str]],
    mounts: str | None = None,
) -> str | None:
    """Why the nodes will not see what is written under `folder`, as a problem of run.root; None where they should.

    Args:
        shared_folders: what the site says all nodes see; None leaves it to the file system's type.
        node_hosts: asks for the machines that the nodes are.
        mounts: /proc/self/mountinfo, or what is taken for it.
    """
    path = folder.absolute().resolve()
    if shared_folders is not None:
        if any(path.is_relative_to(Path(os.path.expandvars(shared)).resolve()) for shared in shared_folders):
            return None
        return (
            f"run.root={folder}: not in a folder that all nodes see (cluster.slurm.shared_folders: "
            f"{', '.join(shared_folders) or 'none'}); choose another run.root"
        )
    kind = file_system(path, Path("/proc/self/mountinfo").read_text() if mounts is None else mounts)
    if kind not in LOCAL_FILE_SYSTEMS or node_hosts() <= {platform.node().split(".")[0], platform.node()}:
        return None
    return (
        f"run.root={folder}: on a {kind} file system of this machine, which other nodes do not see; choose a shared "
        "one, or name it in cluster.slurm.shared_folders if they do"
    )


def file_system(path: Path, mounts: str) -> str:
    """The type of the file system that holds `path`: that of the longest mount point above it."""
    best, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        if path.is_relative_to(point) and len(point.parts) >= best:  # the last mount at a point is the one on top
            best, kind = len(point.parts), after.split()[0]
    return kind
