"""Files and folders that are whole or not there: written under a hidden name, then renamed. No torch.

Checkpoints and recorded steps are made durable before, too. Their `manifest.json` is written last and has every other
file's size and SHA-256, so that what was damaged later is found before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
HASHING_THREADS = 4


@contextmanager
def replacing(path: Path, *, unique: bool = False) -> Iterator[Path]:
    """Give a hidden path in the folder of `path`; what was made there becomes `path`, or is removed after an error.

    A file or link may be there already, and a folder with files may not.

    Args:
        unique: other processes may make the same path at the same time, so each takes a name of its own. Otherwise a
            folder that a killed process left is removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if unique else f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # no file, or gone
            temporary.unlink()
        raise


def damage(path: Path, *, reads: bool = True) -> str | None:
    """What is wrong with a folder's files, naming the first one; None where all are as they were written.

    Args:
        reads: compares their content, too; else only that they are there, with their sizes.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, _) in expected.items():
        file = path / name
        if Path(name).name != name:
            return f"{MANIFEST} names {name}, which lies outside"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    for file in path.glob("*.safetensors"):  # all of which are read
        if file.name not in expected:
            return f"{file.name} is not one of its files"
    if not reads:
        return None
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(sha256, [path / name for name in expected])
        for (name, (_, digest)), found in zip(expected.items(), digests, strict=True):
            if found != digest:
                return f"{name} has changed since it was written"
    return None


def describe(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of files, which are made durable on the way."""
    entries = {}
    for file in files:
        flush(file)
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return entries


def seal(temporary: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Makes `temporary`, whose files `entries` describes, the folder `final`: from now on it is found."""
    (temporary / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")
    flush(temporary / MANIFEST)
    flush(temporary)
    if final.exists():  # of an earlier attempt, and damaged or without its validation
        old = hidden(final)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(final)
    flush(final.parent)


def remove(path: Path) -> None:
    """Removes a folder; one that is half removed is not taken for one."""
    old = hidden(path)
    path.rename(old)
    shutil.rmtree(old)


def hidden(path: Path) -> Path:
    """A name that a folder is removed under; free."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    return old


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """A file's contents, or a folder's names, to permanent storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
