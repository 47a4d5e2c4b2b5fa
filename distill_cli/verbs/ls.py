"""List config groups, or one group's choices with what each is.

examples
  distill ls               the groups
  distill ls loss
  distill ls data
"""

from pathlib import Path

from distill_cli.config.choices import conf_dir, group_choices, groups, nearest
from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser, complete_with


def declare(parser: Parser) -> None:
    group = parser.add_argument("group", nargs="?", metavar="GROUP", help="one of the groups that `distill ls` lists")
    complete_with(group, groups([conf_dir()]))


def main(arguments: Arguments) -> int:
    """Print the groups with their choices, or one group's choices with what each is; return 0.

    Raises:
        ConfigError: there is no such group.
    """
    folder, group = conf_dir(), arguments.group
    known = groups([folder])
    if group is None:
        for name in known:
            print(f"{name:<12}{', '.join(group_choices(name, [folder]))}")
        return 0
    if group not in known:
        raise ConfigError(f"{group}: no such group{nearest(group, known)} (there are: {', '.join(known)})")
    for choice in group_choices(group, [folder]):
        print(f"{group}={choice:<20}{first_comment(folder / group / f'{choice}.yaml')}")
    return 0


def first_comment(file: Path) -> str:
    """Return the first comment line that is not one of Hydra's directives."""
    comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0].lstrip("# ").rstrip() if comments else ""
