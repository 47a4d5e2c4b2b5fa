"""What can be chosen: the config groups and their files, and the known name that is nearest to another. No Hydra."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

PACKAGED_CONF = Path(__file__).parent.parent / "_conf"
CHECKOUT_CONF = Path(__file__).parent.parent.parent / "conf"


def conf_dir() -> Path:
    """The wheel carries conf/ inside the package; a checkout has it beside the package."""
    return PACKAGED_CONF if PACKAGED_CONF.is_dir() else CHECKOUT_CONF


def groups(conf_dirs: Sequence[Path]) -> list[str]:
    return sorted({d.name for folder in conf_dirs for d in folder.iterdir() if d.is_dir() and d.name != "hydra"})


def group_choices(group: str, conf_dirs: Sequence[Path]) -> list[str]:
    return sorted({file.stem for folder in conf_dirs for file in (folder / group).glob("*.yaml")})


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` where something known is close, else nothing."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not found:  # the right last part in another group: topk for loss.topk
        last = name.rsplit(".", 1)[-1]
        by_last = {key.rsplit(".", 1)[-1]: key for key in known}
        close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
        found = [by_last[close[0]]] if close else []
    return f"; did you mean {found[0]}?" if found else ""
