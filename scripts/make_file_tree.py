"""Write the list of the package's files into CONTRIBUTING.md, each with the first sentence of its docstring.

python scripts/make_file_tree.py          # a test checks that it is current
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distill_cli"
LONGEST = 110
BEGIN, END = "<!-- files: begin -->\n", "<!-- files: end -->"


def phrase(file: Path) -> str:
    """Return the first sentence of a module's docstring; if it is long, its part before a semicolon or colon."""
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    for end in (r"\.", "[.;]", "[.;:]"):
        sentence = re.split(rf"(?<=[\w)`']){end}(?: |$)", text)[0]
        if len(sentence) <= LONGEST:
            break
    return sentence


def tree() -> str:
    """Return the list in Markdown: a heading for each folder, a line for each file."""
    lines = []
    files = [file for file in PACKAGE.rglob("*.py") if "assets" not in file.parts]
    folders = sorted({file.parent for file in files}, key=lambda folder: (folder != PACKAGE, folder))
    for folder in folders:
        about = phrase(folder / "__init__.py")
        lines.append(f"- **{folder.relative_to(ROOT)}/** {about}".rstrip())
        for file in sorted(folder.glob("*.py")):
            if file.stem not in ("__init__", "__main__"):
                lines.append(f"  - `{file.name}` {phrase(file)}")
    return "\n".join(lines) + "\n"


def with_tree(page: str) -> str:
    """Return the text of CONTRIBUTING.md with the current list."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    page = ROOT / "CONTRIBUTING.md"
    page.write_text(with_tree(page.read_text()))
