"""Find the runs and sweeps below a folder.

Links are not followed, so a run is found once, and nothing outside the folder is read: a run or a sweep whose files
are links to other places has a problem instead of a page.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from distill_cli.folders.run_dir import Element, SweepDir
from distill_cli.report.read import DAMAGE

DEPTH = 6
"""Most folders from the root down to a run."""
SKIPPED = {"mlartifacts", "mlruns"}
"""MLflow's folders, with copies of the files of runs."""
FILES = ("config.yaml", "command.txt", "env.json", "resolved.json", "metrics.jsonl", "outcome.json")
"""Files that a page is made of."""
OTHERS = ("rollouts", "logs", ".lock", "job.json", "job_end.json")
"""What else is read of a run."""
Stamp = tuple[int, int, int] | None
"""What changes when a file does; None if there is no such file."""


@dataclass(frozen=True)
class Found:
    """A run or a sweep."""

    name: str
    """Its path below the root, `.` if it is the root itself."""
    folder: Path
    runs: tuple["Found", ...] | None = None
    """The runs of a sweep; None for a run."""
    sweep: str = ""
    """The name of the sweep that a run belongs to."""
    settings: dict[str, str] = field(default_factory=dict)
    """The swept keys of a sweep's run, and their values."""
    problem: str = ""
    """Why it is not read; empty if it is."""

    @property
    def query(self) -> str:
        """The part of an address that names it."""
        return f"run={quote(os.fsencode(self.name))}"


def find_runs(root: Path) -> dict[str, Found]:
    """Return the runs and sweeps below a folder by name, a sweep before its runs."""
    return {found.name: found for found in walk(root, root)}


def walk(root: Path, folder: Path, *, depth: int = DEPTH) -> Iterator[Found]:
    """Yield the run or the sweep in a folder, or those below it."""
    name = folder.relative_to(root).as_posix()
    if is_run(folder):
        yield Found(name, folder, problem=_link_problem(root, folder))
    elif os.path.isfile(folder / "sweep.json"):
        yield from _sweep(root, folder, name)
    elif depth:
        with suppress(OSError):  # it may not be read, or is gone
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if entry.name[0] != "." and entry.name not in SKIPPED and entry.is_dir(follow_symlinks=False):
                    yield from walk(root, folder / entry.name, depth=depth - 1)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run's; one with a copy of its config alone is not."""
    has = (os.path.exists(f"{folder}/{name}") for name in ("metrics.jsonl", "logs"))
    return os.path.isfile(f"{folder}/config.yaml") and any(has)


def _sweep(root: Path, folder: Path, name: str) -> Iterator[Found]:
    try:
        if os.path.islink(folder / "sweep.json"):
            raise ValueError("it is a link")
        runs = tuple(_element(root, folder, name, element) for element in SweepDir(folder).elements())
    except DAMAGE as error:
        yield Found(name, folder, (), problem=f"sweep.json cannot be read ({error})")
        return
    problem = next((f"{run.folder.name}: {run.problem}" for run in runs if run.problem), "")
    yield Found(name, folder, runs, problem=problem)
    yield from runs


def _element(root: Path, sweep: Path, name: str, element: Element) -> Found:
    """Return a run of a sweep. Raises ValueError if its folder is not one inside the sweep's."""
    folder = sweep / element.folder
    if Path(element.folder).name != element.folder or element.folder in ("", "..") or folder.is_symlink():
        raise ValueError(f"{element.folder!r} is not a folder of its own")
    settings = dict(text.lstrip("+").partition("=")[::2] for text in element.overrides)
    return Found(f"{name}/{element.folder}", folder, None, name, settings, _link_problem(root, folder))


def _link_problem(root: Path, folder: Path) -> str:
    for file in (*FILES, *OTHERS):
        if os.path.islink(f"{folder}/{file}") and not is_inside(root, folder / file):
            return f"{file} is a link to another place"
    return ""


def is_inside(root: Path, path: Path) -> bool:
    """Return whether a path is below the root after its links are followed."""
    return path.resolve().is_relative_to(root)


def stamps(folder: Path, names: Sequence[str]) -> tuple[Stamp, ...]:
    """Return the stamp of each of these files."""
    return tuple(_stamp(f"{folder}/{name}") for name in names)


def _stamp(file: str) -> Stamp:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if stat.S_ISREG(status.st_mode) else None
