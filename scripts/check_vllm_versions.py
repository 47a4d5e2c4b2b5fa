"""Search unpacked vLLM releases for the names that the engines need, without importing them.

    python scripts/check_vllm_versions.py FOLDER...

Each FOLDER holds one release, with its `vllm/`: an unpacked wheel (`pip download --no-deps vllm==0.33.0`, `unzip`), or
a checkout. Print the releases that have each name; exit with status 1 if a release lacks one.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from functools import cache
from pathlib import Path

from distill_cli.engines import vllm_patches  # noqa: F401, it declares them
from distill_cli.engines.reach import REACHES, Reach


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    folders = sorted(parser.parse_args().folders, key=lambda folder: version(folder))
    for folder in folders:
        if not (folder / "vllm").is_dir():
            parser.error(f"{folder}: has no folder vllm/")
    lacking = set()
    for reach in REACHES:
        found = [folder for folder in folders if has(folder, reach)]
        lacking |= set() if reach.optional else set(folders) - set(found)
        spelled = " or ".join(f"{reach.module}.{name}" for name in reach.names)
        where = "all" if len(found) == len(folders) else ", ".join(".".join(map(str, version(f))) for f in found)
        print(f"{spelled}{f' ({reach.parameter}=)' if reach.parameter else ''}: {where or 'none'}")
    for folder in folders:
        print(f"{folder}: {'lacks names' if folder in lacking else 'has all names'}")
    sys.exit(bool(lacking))


def version(folder: Path) -> tuple[int, ...]:
    """Read the version from the wheel's metadata, or from the folder's name."""
    metadata = next(folder.glob("vllm*.dist-info/METADATA"), None)
    text = re.search(r"^Version: (.*)$", metadata.read_text(), re.M)[1] if metadata else folder.name
    return tuple(map(int, re.findall(r"\d+", text)[:3]))


def has(folder: Path, reach: Reach) -> bool:
    file = folder.joinpath(*reach.module.split(".")).with_suffix(".py")
    if not file.is_file():
        return False
    tree = parse(file)
    for name in reach.names:
        found = lookup(tree, name.split("."))
        if found is not None and (reach.parameter is None or reach.parameter in parameters(found)):
            return True
    return False


@cache
def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def lookup(node: ast.AST, path: list[str]) -> ast.AST | None:
    """Return the definition, assignment or import that binds a dotted name; None if there is none."""
    for child in ast.walk(node) if isinstance(node, ast.Module) else node.body:
        if path[0] in names_of(child):
            return child if len(path) == 1 else lookup(child, path[1:])
    return None


def names_of(node: ast.AST) -> list[str]:
    """Return the names that a statement binds."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return [node.name]
        case ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.Assign() | ast.AnnAssign():
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def parameters(node: ast.AST) -> list[str]:
    """Return the names of a function's arguments."""
    if not isinstance(node, ast.FunctionDef):
        return []
    arguments = node.args
    return [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


if __name__ == "__main__":
    main()
