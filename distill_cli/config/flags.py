"""Hydra's own flags, which `train`, `plan` and `check` take. Hydra itself declares them in a private parser only."""

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from distill_cli.config.choices import conf_dir

ANSWERED = ("--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc")
"""Flags that Hydra answers without running anything."""
MULTIRUN = "a sweep: every combination of the values"
"""Help of -m."""


def add_hydra_flags(parser: argparse.ArgumentParser) -> None:
    """Declare Hydra's flags. What is typed becomes `flags`: long names with their values, as Hydra parses them."""
    parser.usage = " ".join([*parser.format_usage().split()[1:], "[HYDRA'S FLAGS]"])
    group = parser.add_argument_group("Hydra's flags")
    one_of = partial(group.add_mutually_exclusive_group().add_argument, action=_Collect)
    add, hidden, what = partial(group.add_argument, action=_Collect), argparse.SUPPRESS, ("job", "hydra", "all")
    parts = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
    one_of("-m", "--multirun", nargs=0, help=MULTIRUN)
    one_of("--cfg", "-c", choices=what, metavar="WHAT", help="print the composed config: job, hydra or all")
    add("--resolve", nargs=0, help="with --cfg: resolve interpolations")
    add("--package", "-p", metavar="KEY", help="with --cfg: print this part alone")
    one_of("--info", "-i", nargs="?", const="all", metavar="WHAT", choices=parts, help="print how it is composed")
    add("--config-dir", "-cd", metavar="DIR", help="a further folder of config groups")
    add("--hydra-help", nargs=0, help="print all of Hydra's flags")
    one_of("--shell-completion", "-sc", nargs=0, help=hidden)
    add("--run", "-r", nargs=0, help=hidden)
    for names in (("--config-path", "-cp"), ("--config-name", "-cn"), ("--experimental-rerun",)):
        add(*names, help=hidden)


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
