"""Config groups and their files, and suggestions for mistyped names. No Hydra."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

SEVERAL = ("tracker",)
"""Groups of which several files may be chosen: tracker=[mlflow,wandb]."""


def conf_dir() -> Path:
    """Return the folder conf/: inside the package in a wheel, next to the package in a checkout."""
    packaged = Path(__file__).parent.parent / "_conf"
    return packaged if packaged.is_dir() else packaged.parent.parent / "conf"


def groups(conf_dirs: Sequence[Path]) -> list[str]:
    """Return the names of the config groups; one inside another has both names, as in loss/token_weight."""
    found = {d.relative_to(folder).as_posix() for folder in conf_dirs for d in folder.rglob("*") if d.is_dir()}
    return sorted(name for name in found if name.partition("/")[0] != "hydra")


def group_choices(group: str, conf_dirs: Sequence[Path]) -> list[str]:
    """Return the names of a group's files."""
    return sorted({file.stem for folder in conf_dirs for file in (folder / group).glob("*.yaml")})


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean x?` if a known name is close, else an empty string."""
    known = list(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not matches:  # the last part may be right, in another group: topk for loss.topk
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        lasts = difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last, n=1, cutoff=0.75)
        matches = [by_last[last] for last in lasts]
    return f"; did you mean {matches[0]}?" if matches else ""
