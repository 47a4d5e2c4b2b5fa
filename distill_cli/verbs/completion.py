"""What Tab offers where Hydra, which knows groups, choices and keys, offers nothing: verbs, flags, their values.

Hydra's function in the shell runs `distill -sc query=bash` with the line in COMP_LINE. If nothing is offered, the shell
offers files: right for the folder of `resume RUN`.
"""

import argparse
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

from distill_cli.verbs.command_line import VERBS, is_override, parser_of


def is_requested(argv: Sequence[str], env: Mapping[str, str]) -> bool:
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
    offers = starting(word, values_of(open_flag or place))
    needs_value = open_flag is not None and open_flag.nargs != "?" and typed[-1].startswith("-")
    if needs_value or place is None or place.dest != "overrides":
        return offers, None
    return [*starting(word, () if before else VERBS), *offers], [one for one in words if is_override(one)]


def values_of(place: argparse.Action | None) -> Iterable[str]:
    """Return the known values of a flag or a word: its choices, or its `complete` if others are allowed."""
    return getattr(place, "choices", None) or getattr(place, "complete", None) or ()


def starting(word: str, offers: Iterable[str]) -> list[str]:
    return [offer for offer in offers if offer.startswith(word)]
