"""`distill ls`: the config groups and their choices, as the files themselves describe them."""

from __future__ import annotations

from pathlib import Path

from distill_cli.config.choices import group_choices, groups, nearest
from distill_cli.errors import ConfigError


def print_choices(conf_dir: Path, group: str | None) -> None:
    """All groups with their choices, or one group's choices with what each is.

    Raises:
        ConfigError: there is no such group.
    """
    known = groups([conf_dir])
    if group is None:
        for name in known:
            print(f"{name:<12}{', '.join(group_choices(name, [conf_dir]))}")
        return
    if group not in known:
        raise ConfigError(f"{group}: no such group{nearest(group, known)} (there are: {', '.join(known)})")
    for choice in group_choices(group, [conf_dir]):
        print(f"{group}={choice:<20}{first_comment(conf_dir / group / f'{choice}.yaml')}")


def first_comment(file: Path) -> str:
    """The first comment line that is none of Hydra's directives."""
    for line in file.read_text().splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""
