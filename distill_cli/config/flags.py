"""Hydra's own flags, which `train`, `plan` and `check` take. Hydra itself declares them in a private parser only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill_cli.config.choices import conf_dir

ANSWERED = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
"""Flags that Hydra answers without running anything."""


def add_hydra_flags(parser: argparse.ArgumentParser) -> None:
    """Declare Hydra's flags. What is typed becomes `flags`: long names with their values, as Hydra parses them."""
    parser.usage = " ".join([*parser.format_usage().split()[1:], "[HYDRA'S FLAGS]"])
    group = parser.add_argument_group("Hydra's flags")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument("-m", "--multirun", action=_Collect, nargs=0, help="a sweep: every combination of the values")
    one_of.add_argument(
        *("--cfg", "-c"), action=_Collect, choices=("job", "hydra", "all"), metavar="WHAT",
        help="print the composed configuration: job, hydra or all",
    )  # fmt: skip
    group.add_argument("--resolve", action=_Collect, nargs=0, help="with --cfg: resolve interpolations")
    group.add_argument("--package", "-p", action=_Collect, metavar="KEY", help="with --cfg: print this part alone")
    one_of.add_argument(
        *("--info", "-i"), action=_Collect, nargs="?", const="all", metavar="WHAT",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        help="print how the configuration is composed",
    )  # fmt: skip
    group.add_argument("--config-dir", "-cd", action=_Collect, metavar="DIR", help="a further folder of config groups")
    group.add_argument("--hydra-help", action=_Collect, nargs=0, help="print all of Hydra's flags")
    one_of.add_argument("--shell-completion", "-sc", action=_Collect, nargs=0, help=argparse.SUPPRESS)
    group.add_argument("--run", "-r", action=_Collect, nargs=0, help=argparse.SUPPRESS)
    for names in (("--config-path", "-cp"), ("--config-name", "-cn"), ("--experimental-rerun",)):
        group.add_argument(*names, action=_Collect, help=argparse.SUPPRESS)


def conf_dirs(flags: Sequence[str]) -> list[Path]:
    """Return the folders of config groups: the package's own, and the one that `--config-dir` adds."""
    folders = [conf_dir(), *(Path(value) for flag, value in pairwise(flags) if flag == "--config-dir")]
    return [folder for folder in folders if folder.is_dir()]


class _Collect(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, "flags", default=[], **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = max(self.option_strings, key=len)
        namespace.flags = [*namespace.flags, name, *([values] if isinstance(values, str) else [])]
