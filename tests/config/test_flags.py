"""Hydra's flags: all are accepted, in any order, and reach Hydra in the order that it can parse."""

from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser

from distill_cli.config.choices import conf_dir
from distill_cli.config.flags import ANSWERED, conf_dirs
from distill_cli.verbs.command_line import parser_of

NOT_PASSED = {"-h", "--help", "--version"}


def collected(line: str) -> tuple[list[str], list[str]]:
    arguments = parser_of("train").parse(line.split())
    return arguments.overrides, arguments.flags


def test_every_flag_of_hydra_is_declared() -> None:
    theirs = {name for action in get_args_parser()._actions for name in action.option_strings}
    ours = set(parser_of("train")._option_string_actions)
    assert theirs - NOT_PASSED == ours - NOT_PASSED - {"--wait"}
    assert theirs > set(ANSWERED)


@pytest.mark.parametrize(
    ("line", "overrides", "flags"),
    [
        ("a=1 --cfg job b=2", "a=1 b=2", "--cfg job"),
        ("-c=job -p loss --resolve", "", "--cfg job --package loss --resolve"),
        ("-m a=1,2", "a=1,2", "--multirun"),
        ("--info a=1", "a=1", "--info all"),
        ("-i defaults a=1", "a=1", "--info defaults"),
        ("a=1 --info", "a=1", "--info all"),
        ("-cd x=y a=1 -cn other", "a=1", "--config-dir x=y --config-name other"),
        ("-sc query=bash", "query=bash", "--shell-completion"),
        ("+a=1 ~b", "+a=1 ~b", ""),
    ],
)
def test_flags_are_separated_from_overrides(line: str, overrides: str, flags: str) -> None:
    typed = collected(line)
    assert typed == (overrides.split(), flags.split())
    parsed = get_args_parser().parse_args([*typed[0], *typed[1]])
    assert parsed.overrides == overrides.split()


def test_config_dir_adds_a_folder(tmp_path: Path) -> None:
    assert conf_dirs([]) == [conf_dir()]
    assert conf_dirs(["--config-dir", str(tmp_path)]) == [conf_dir(), tmp_path]
    assert conf_dirs(["--config-dir", str(tmp_path / "none")]) == [conf_dir()]
