"""Write a small project of your own: config files, data, a reward, a divergence, a test.

It runs as it is, with the pair that ships with distill; its README.md has the commands.

examples
  distill init my_project
"""

import json
import shutil
from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser

PROJECT = Path(__file__).parent.parent / "assets" / "project"
SIZES = {"train": 512, "validation": 128}
"""Rows of the data files."""


def declare(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="made; it must not exist, or be empty")


def main(arguments: Arguments) -> int:
    """Write the project; return the exit status.

    Raises:
        ConfigError: the folder has files, or cannot be written.
    """
    from distill_cli.data.sources import arithmetic

    folder = arguments.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists already; give a folder that does not, or an empty one")
    try:
        shutil.copytree(PROJECT, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "gitignore").rename(folder / ".gitignore")
        (folder / "data").mkdir()
        for split, size in SIZES.items():
            rows = arithmetic.load(split=split, size=size, seed=0)
            lines = (json.dumps({"question": row.question, "answer": row.answer}) for row in rows)
            (folder / "data" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror or error}); give another folder") from error
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(file)
    print(f"\nnext: cd {folder}; distill --config-dir conf experiment=mine        (README.md has more)")
    return 0
