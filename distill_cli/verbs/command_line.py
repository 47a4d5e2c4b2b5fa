"""The list of verbs, the parser that all of them use, and completion by Tab.

A verb's module has a docstring (a summary in one line, what the verb does, `examples`), `declare(parser)` and
`main(arguments)`. Parsing, `distill --help`, `distill VERB --help` and completion follow from these three. What does
the work is imported inside `main`: help and completion answer without Hydra and Rich.

Tab offers verbs, flags and their values where Hydra, which knows groups, choices and keys, offers nothing. Hydra's
function in the shell runs `distill -sc query=bash` with the line in COMP_LINE. If nothing is offered, the shell offers
files: right for the folder of `resume RUN`.
"""

import argparse
import importlib
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from distill_cli.config.choices import SEVERAL, conf_dir, group_choices, groups, nearest
from distill_cli.errors import ConfigError, refuse

Arguments = argparse.Namespace
VERBS = (
    *("init", "train", "plan", "check", "resume", "replay", "watch", "ui", "eval", "chat", "export", "prune"),
    *("serve", "report", "track", "ls", "doctor"),
)


class Parser(argparse.ArgumentParser):
    """argparse's parser of one verb: errors are ConfigError, and flags and overrides may stand anywhere on the line."""

    def __init__(self, verb: str) -> None:
        body, _, examples = text(verb).partition("\nexamples\n")
        super().__init__(
            prog=f"distill {verb}",
            description=body,
            epilog=f"examples\n{examples}",
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
            allow_abbrev=False,
        )
        self._subject: argparse.Action | None = None

    def add_subject(self, metavar: str, *, help: str) -> None:
        """Declare one run (or model) with overrides: `subject` is the word that is no override, wherever it stands."""
        self._subject = self.add_argument("subject", metavar=metavar, help=help)
        self.add_overrides()

    def add_overrides(self) -> None:
        self.add_argument("overrides", nargs="*", default=[], metavar="OVERRIDE", help="key=value or group=choice")

    def add_wait(self) -> None:
        """Declare `--wait`, which is the override cluster.wait=true."""
        self.add_argument("--wait", action="store_true", help="follow the submitted job, exit with its status")

    def add_step(self, *names: str, help: str) -> None:
        """Declare `--step`, which takes the number of a step or one of `names`."""
        step = self.add_argument("--step", type=partial(_step, names), metavar="|".join(("N", *names)), help=help)
        complete_with(step, names)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message} ({' '.join(self.format_usage().split())})")

    def flags(self) -> dict[str, argparse.Action]:
        """Return every flag that is not hidden, by each of its names."""
        shown = [action for action in self._actions if action.help is not argparse.SUPPRESS]
        return {name: action for action in shown for name in action.option_strings}

    def positionals(self) -> list[argparse.Action]:
        return [action for action in self._actions if not action.option_strings]

    def parse(self, words: Sequence[str]) -> Arguments:
        """Parse what was typed after the verb.

        Raises:
            ConfigError: a flag is unknown or lacks its value, or a word is missing or one too many.
        """
        typed = [word.partition("=")[0] for word in words if word.startswith("-")]
        rule = f"{self.prog} has no such flag"
        unknown = [name for name in typed if name not in self._option_string_actions]
        refuse(f"{name}: {rule}{nearest(name, self.flags())} ({self.prog} --help)" for name in unknown)
        arguments, rest = self.parse_known_intermixed_args(self._joined(words))
        if rest:
            self.error(f"{' '.join(rest)}: one word too many")
        if self._subject:
            typed = [arguments.subject, *arguments.overrides]
            arguments.overrides = [word for word in typed if is_override(word)]
            subjects = [word for word in typed if not is_override(word)]
            if len(subjects) != 1:
                self.error(f"{' '.join(subjects or typed)}: give one {self._subject.metavar}")
            (arguments.subject,) = subjects
        if getattr(arguments, "wait", False):
            arguments.overrides = [*arguments.overrides, "cluster.wait=true"]
        return arguments

    def _joined(self, words: Sequence[str]) -> list[str]:
        """Keep a flag whose value is optional from taking an override for it: `--info loss=mixed`."""
        optional = {name: action for action in self._actions if action.nargs == "?" for name in action.option_strings}
        joined = []
        for word, following in pairwise([*words, ""]):
            takes_none = word in optional and following not in (optional[word].choices or ())
            joined.append(f"{word}={optional[word].const}" if takes_none else word)
        return joined


def complete_with(action: argparse.Action, values: Sequence[str]) -> None:
    """Let Tab offer these values of a flag or word that takes others too."""
    action.complete = values  # type: ignore[attr-defined]  # as shtab has it


def is_override(word: str) -> bool:
    """Return whether a word is an override and not a path, such as a run of a sweep: `runs/s/0_topk=32`."""
    key, has_value, _ = word.partition("=")
    if word.startswith(("+", "~")):
        return True
    is_group = key.startswith("hydra/") or key.split("@")[0] in groups([conf_dir()])
    return bool(has_value) and not Path(word).exists() and ("/" not in key or is_group)


def _step(names: Sequence[str], word: str) -> str:
    if not word.isdecimal() and word not in names:
        raise ConfigError(f"--step {word}: must be the number of a step{', ' if names else ''}{' or '.join(names)}")
    return word


def given(word: str) -> str:
    """Return a flag's value; the type of a flag whose value must not be empty."""
    if not word:
        raise argparse.ArgumentTypeError("a value is needed")
    return word


def number(flag: str, text: str, *, at_least: int, at_most: int | None = None) -> int:
    """Return the whole number in a flag's value. Raises ConfigError if there is none, or it is out of range."""
    rule = f"at least {at_least}" if at_most is None else f"from {at_least} to {at_most}"
    if not text.isdecimal() or int(text) < at_least or (at_most is not None and int(text) > at_most):
        raise ConfigError(f"{flag} {text}: must be a whole number {rule}")
    return int(text)


def text(verb: str) -> str:
    """Return the docstring of a verb's module, without importing it."""
    return Path(__file__).with_name(f"{verb}.py").read_text().split('"""')[1]


def module_of(verb: str) -> ModuleType:
    return importlib.import_module(f"distill_cli.verbs.{verb}")


def parser_of(verb: str) -> Parser:
    parser = Parser(verb)
    module_of(verb).declare(parser)
    return parser


def is_completion(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    """Return whether the shell runs this command for completion."""
    return not {"-sc", "--shell-completion"}.isdisjoint(argv) and "COMP_LINE" in env


def complete(env: MutableMapping[str, str] = os.environ) -> bool:
    """Print what is offered. Return whether Hydra has more to offer; then only overrides are left of the line."""
    line = env["COMP_LINE"][: int(env.get("COMP_POINT") or len(env["COMP_LINE"]))]
    command, *words = line.split(" ")
    *before, word = words or [""]
    offers, overrides = offered([typed for typed in before if typed], word)
    if offers:
        print(" ".join(offers))
    if overrides is not None:
        env["COMP_LINE"] = " ".join([command, *overrides, word])
        env["COMP_POINT"] = str(len(env["COMP_LINE"]))
    return overrides is not None


def offered(before: Sequence[str], word: str) -> tuple[list[str], list[str] | None]:
    """Return what is offered for a line's last word, and the overrides before it; None if no override can follow."""
    verb, *typed = before if before and before[0] in VERBS else ("train", *before)
    parser = parser_of(verb)
    flags, places = parser.flags(), parser.positionals()
    words: list[str] = []
    open_flag: argparse.Action | None = None
    for one in typed:
        if one.startswith("-"):
            flag = flags.get(one)
            open_flag = flag if flag is not None and flag.nargs != 0 else None
        elif open_flag is None:
            words.append(one)
        elif open_flag.nargs != "+":
            open_flag = None
    if word.startswith("-"):
        return starting(word, flags), None
    place = places[min(len(words), len(places) - 1)] if places else None
    asked = open_flag or place
    offers = starting(word, getattr(asked, "choices", None) or getattr(asked, "complete", None) or ())
    needs_value = open_flag is not None and open_flag.nargs != "?" and typed[-1].startswith("-")
    if needs_value or place is None or place.dest != "overrides":
        return offers, None
    offers = [*starting(word, () if before else VERBS), *offers, *in_list(word)]
    return offers, [one for one in words if is_override(one)]


def in_list(word: str) -> list[str]:
    """Return what is offered inside a list of choices, such as `tracker=[mlflow,w`."""
    group, _, typed = word.partition("=[")
    *chosen, last = typed.split(",")
    choices = group_choices(group, [conf_dir()]) if group in SEVERAL and f"{group}=[" in word else []
    return [f"{group}=[{','.join([*chosen, one])}" for one in starting(last, choices) if one not in chosen]


def starting(word: str, offers: Iterable[str]) -> list[str]:
    return [offer for offer in offers if offer.startswith(word)]
