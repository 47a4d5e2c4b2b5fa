"""Hydra's flags told from overrides, and what is wrong with them in one line each, not in a page on usage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from distill_cli.config.choices import conf_dir

TAKE_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
}
INFO = ("--info", "-i")
INFO_VALUES = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
"""What may follow `--info`, and need not."""


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides, and the flags with their values. In that order Hydra takes them, wherever a flag was typed."""
    overrides, flags, before = [], [], ""
    for word in argv:
        is_value = before in TAKE_VALUE or (before in INFO and word in INFO_VALUES)
        (flags if is_value or word.startswith("-") else overrides).append(word)
        before = "" if is_value else word
    return overrides, flags


def flag_problems(flags: Sequence[str]) -> list[str]:
    """What Hydra would end the process for."""
    parser = get_args_parser()
    parser.error = _raise
    try:
        asked = parser.parse_args(list(flags))
    except _Refused as refused:
        return [f"{refused} (distill --help)"]
    kinds = {"--cfg": asked.cfg, "--info": asked.info, "-m": asked.multirun, "-sc": asked.shell_completion}
    given = [flag for flag, value in kinds.items() if value]
    problems = [f"{' and '.join(given)}: exclude each other; drop one"] if len(given) > 1 else []
    if asked.resolve and not asked.cfg:
        problems.append("--resolve: is for --cfg; add it, or leave this out")
    return problems


def conf_dirs(argv: Sequence[str]) -> list[Path]:
    """Where config files may lie: ours, and what `--config-dir` adds."""
    folders = [conf_dir()]
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value))
        elif flag.startswith("--config-dir="):
            folders.append(Path(flag.split("=", 1)[1]))
    return [folder for folder in folders if folder.is_dir()]


class _Refused(Exception):
    pass


def _raise(message: str) -> NoReturn:
    raise _Refused(message)
