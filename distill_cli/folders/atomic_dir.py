"""Files and folders that are complete or absent: written under a hidden name, then renamed. No torch.

Checkpoints and recorded steps are also made durable first. Their `manifest.json` is written last and lists the size and
SHA-256 of every other file, so that later damage is found before the folder is used.
"""

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
    """Yield a hidden path in the folder of `path`; rename it to `path` on success, remove it after an error.

    `path` may be an existing file or link, but not a folder with files.

    Args:
        unique: other processes may make the same path at the same time, so each uses its own hidden name. Otherwise
            remove the hidden folder that a killed process left.
    """
    temporary = hidden(path, f"{os.getpid()}.tmp" if unique else "tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # a folder, or absent
            temporary.unlink()
        raise


def damage(path: Path, *, reads: bool = True) -> str | None:
    """Return the first difference between a sealed folder's files and its manifest; None if there is none.

    Args:
        reads: compare the files' contents too, not only their presence and sizes.
    """
    try:
        files: dict[str, dict[str, Any]] = json.loads((path / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    for name, (size, _) in expected.items():
        file = path / name
        if Path(name).name != name:
            return f"{MANIFEST} names {name}, which is outside the folder"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    for file in path.glob("*.safetensors"):  # readers open them all
        if file.name not in expected:
            return f"{file.name} is not in {MANIFEST}"
    if reads:
        with ThreadPoolExecutor(HASHING_THREADS) as threads:
            digests = threads.map(sha256, [path / name for name in expected])
            for (name, (_, digest)), found in zip(expected.items(), digests, strict=True):
                if found != digest:
                    return f"{name} has changed since it was written"
    return None


def describe(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Flush the files to disk; return their entries in the manifest."""
    entries = {}
    for file in files:
        flush(file)
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    return entries


def seal(temporary: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Turn the folder `temporary`, whose files `entries` describes, into `final`, durably and at once."""
    (temporary / MANIFEST).write_text(json.dumps({"files": entries}, indent=2) + "\n")
    flush(temporary / MANIFEST)
    flush(temporary)
    old = _hide(final)  # an earlier attempt's: damaged, or without its validation
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    flush(final.parent)


def remove(path: Path) -> None:
    """Remove a folder under a hidden name, so that a half removed one is never found."""
    shutil.rmtree(_hide(path))


def _hide(path: Path) -> Path:
    old = hidden(path, "old")
    shutil.rmtree(old, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.rename(old)
    return old


def hidden(path: Path, end: str) -> Path:
    """Return the hidden name under which a path is written (`tmp`) or removed (`old`)."""
    return path.with_name(f".{path.name}.{end}")


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Flush a file's contents, or a folder's entries, to permanent storage."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
