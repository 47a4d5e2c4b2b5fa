"""Write the table of families into docs/models.md, from distill_cli/models/families.json.

python scripts/make_models_doc.py            write it
python scripts/make_models_doc.py --check    fail if it is not current
"""

import argparse
import re
import sys
from pathlib import Path

from distill_cli.models.tried_families import LAYOUTS, Family, tried, versions

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


REFUSED = re.compile(r"mesh\.\w+(?:=\d+)?: (?:the family )?(?:\w+ (?=has |cannot ))?([^;]*)")
"""A refusal: what follows the key and the family's name, up to what to do instead."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    page = before + BEGIN + table() + END + rest.split(END)[1]
    if not parser.parse_args().check:
        PAGE.write_text(page)
        return 0
    if text == page:
        return 0
    print("docs/models.md is not current: python scripts/make_models_doc.py", file=sys.stderr)
    return 1


def table() -> str:
    """Return the table, and below it the reason for each no."""
    found = list(tried().values())
    packages = ", ".join(f"{package} {version}" for package, version in versions().items())
    lines = [f"Tried with {packages}.\n\n"]
    head = ["family", "one rank", *LAYOUTS, "check", "check, LoRA"]
    lines += ["| " + " | ".join(head) + " |\n", "|---" * len(head) + "|\n"]
    notes: dict[str, list[str]] = {}
    for one in found:
        lines.append("| " + " | ".join([f"`{one.name}`", *cells(one, notes)]) + " |\n")
    lines.append("\n")
    for number, (text, where) in enumerate(notes.items(), start=1):
        lines.append(f"{number}. {', '.join(where)}: {text}\n")
    return "".join([*lines, "\n"] if notes else lines)


def cells(one: Family, notes: dict[str, list[str]]) -> list[str]:
    """Return a family's cells: differences, `ok`, or the number of a note."""
    made = []
    for column in ("one rank", *LAYOUTS):
        value = one.layouts.get(column, "not tried")
        made.append(f"{value:.0e}" if isinstance(value, float) else note(value, f"`{one.name}`", notes))
    for kind in ("full", "lora"):
        value = one.checks.get(kind, "not tried")
        made.append(value if value == "ok" else note(value, f"`{one.name}`", notes))
    return made


def note(text: str, where: str, notes: dict[str, list[str]]) -> str:
    """Return a reference to a note; families with the same share one."""
    if "no experts" in text:
        return ""
    if text == "not tried":
        return text
    if refused := REFUSED.match(text):
        text = refused[1]
    text = text.replace("|", "\\|")
    found = notes.setdefault(text, [])
    if where not in found:
        found.append(where)
    return f"({list(notes).index(text) + 1})"


if __name__ == "__main__":
    sys.exit(main())
