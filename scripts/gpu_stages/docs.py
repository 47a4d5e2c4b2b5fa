"""Write results.json into the GPU section of docs/performance.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from gpu_stages import STAGES
from gpu_stages.figures import show, target

BEGIN, END = "<!-- gpu_acceptance: begin -->", "<!-- gpu_acceptance: end -->"


def write_docs(results_file: Path, page: Path) -> int:
    """Replace the text between the page's two marks; return the exit status.

    The status is 2 if the file has no GPU results or the page has no marks.
    """
    try:
        results = json.loads(results_file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        return refuse(f"{results_file}: not a results.json ({error})")
    if results.get("rehearsal") or "card" not in results.get("machine", {}):
        return refuse(f"{results_file}: not the results of a GPU")
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return refuse(f"{page}: needs {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{section(results)}\n{END}{rest.split(END)[1]}")
    print(f"written: {page}")
    return 0


def refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


VERSIONS = ("python", "torch", "cuda", "vllm", "transformers", "triton")


def section(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if name in machine)
    card = f"{machine['card']} ({machine['memory']}, driver {machine.get('driver', 'unknown')})"
    lines = [
        f"One {card}, {machine['cpus']} CPU cores; {versions}.",
    ]
    for name in STAGES:
        found = results["stages"].get(name)
        if found is None:
            continue
        lines += ["", f"### {name}. {found['title']}", "", origin(found), ""]
        if found["state"] != "passed":
            lines += [f"{found['state']}{': ' + found['error'] if found.get('error') else ''}", ""]
        if found.get("figures"):
            lines += ["| figure | value | target | met |", "|---|---|---|---|"]
            lines += [figure_row(figure) for figure in found["figures"]]
        for title, rows in found.get("tables", {}).items():
            lines += ["", f"{title}:", "", *table(rows)]
    return "\n".join(lines)


def origin(found: dict[str, Any]) -> str:
    """Format a stage's command, commit and duration."""
    seconds = f", {found['seconds']:.0f} s" if "seconds" in found else ""
    return f"`{found['command']}`, commit {found['commit']}{seconds}"


def figure_row(figure: dict[str, Any]) -> str:
    met = {True: "yes", False: "**no**", None: ""}[figure["is_met"]]
    value = f"{show(figure['value'])} {figure['unit']}".strip()
    return f"| {figure['name']} | {value} | {target(figure)} | {met} |"


def table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["(empty)"]
    names = list(rows[0])
    return [
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(f"| {' | '.join(cell(row[name]) for name in names)} |" for row in rows),
    ]


def cell(value: Any) -> str:
    return show(value) if isinstance(value, float) else str(value).replace("|", "\\|")
