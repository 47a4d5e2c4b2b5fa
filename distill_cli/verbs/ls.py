"""List config groups, one group's choices with what each is, or the file of a choice.

examples
  distill ls               the groups
  distill ls loss
  distill ls data
  distill ls experiment=smollm2
  distill ls families      the model families that were tried, and what works with each
"""

from pathlib import Path

from distill_cli.config.choices import conf_dir, group_choices, groups, nearest
from distill_cli.errors import ConfigError
from distill_cli.models import tried_families
from distill_cli.verbs.command_line import Arguments, Parser, complete_with

FAMILIES = "families"


def declare(parser: Parser) -> None:
    group = parser.add_argument(
        "group", nargs="?", metavar="GROUP", help="a group that `distill ls` lists, or GROUP=CHOICE"
    )
    complete_with(group, [*groups([conf_dir()]), FAMILIES])


def main(arguments: Arguments) -> int:
    """Print the groups with their choices, one group's choices with what each is, or a choice's file; return 0.

    Raises:
        ConfigError: there is no such group or choice.
    """
    folder, known = conf_dir(), groups([conf_dir()])
    group, _, chosen = (arguments.group or "").partition("=")
    if not group:
        for name in known:
            print(f"{name:<18}{', '.join(group_choices(name, [folder]))}")
        return 0
    if group == FAMILIES:
        print("\n".join(family_lines()))
        return 0
    if group not in known:
        raise ConfigError(f"{group}: no such group{nearest(group, known)} (there are: {', '.join(known)})")
    choices = group_choices(group, [folder])
    if chosen:
        if chosen not in choices:
            raise ConfigError(f"{group}={chosen}: no such choice{nearest(chosen, choices)} ({', '.join(choices)})")
        print((folder / group / f"{chosen}.yaml").read_text(), end="")
        return 0
    for choice in choices:
        print(f"{group}={choice:<20}{first_comment(folder / group / f'{choice}.yaml')}")
    return 0


def family_lines() -> list[str]:
    """Return a table: family, what its student can be cut over, adapters, teacher, and the difference that was seen."""
    lines = [f"{'family':<20}{'student':<32}{'LoRA':<6}{'teacher':<9}difference from plain transformers"]
    for one in tried_families.tried().values():
        student = ", ".join(["one rank", *one.axes()]) if one.trains else "no"
        yes = {True: "yes", False: "no"}
        lora, teacher = yes[one.checks.get("lora") == "ok"], yes[one.is_served]
        seen = "" if one.difference is None else f"{one.difference:.0e}"
        lines.append(f"{one.name:<20}{student:<32}{lora:<6}{teacher:<9}{seen}")
    shown = ", ".join(f"{package} {version}" for package, version in tried_families.versions().items())
    return [*lines, f"({shown}; reasons: docs/models.md; others may work: `distill check` tells)"]


def first_comment(file: Path) -> str:
    """Return the first comment line that is not one of Hydra's directives."""
    comments = [line for line in file.read_text().splitlines() if line.startswith("#") and "@package" not in line]
    return comments[0].lstrip("# ").rstrip() if comments else ""
