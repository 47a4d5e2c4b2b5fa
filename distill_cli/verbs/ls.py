"""List config groups, or one group's choices with what each is.

examples
  distill ls               the groups
  distill ls loss
  distill ls data
"""

from __future__ import annotations

import argparse
from pathlib import Path

from distill_cli.config.choices import conf_dir, group_choices, groups, nearest
from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Parser


def declare(parser: Parser) -> None:
    group = parser.add_argument("group", nargs="?", metavar="GROUP", help="one of the groups that `distill ls` lists")
    group.complete = groups([conf_dir()])


def main(arguments: argparse.Namespace) -> int:
    """Print the groups or choices; return 0."""
    print_choices(conf_dir(), arguments.group)
    return 0


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
