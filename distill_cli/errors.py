"""Failures: the user's input is wrong (exit status 2), or something failed in a run (exit status 1).

Being stopped is none of them (exit status 128 and the signal's number).
"""

import signal
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Result = TypeVar("Result")


class DistillError(Exception):
    """A failure while running. The message is one line that says what failed and where to look."""


class ConfigError(DistillError):
    """The user's input is wrong.

    Each problem says what, value, rule and fix in one line. All problems found are reported at once.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def collect(calls: Iterable[Callable[[], Result]]) -> list[Result]:
    """Return what the calls return. Raises ConfigError with the problems of all calls that raise it, each once."""
    results: list[Result] = []
    problems: dict[str, None] = {}
    for call in calls:
        try:
            results.append(call())
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    refuse(problems)
    return results


def refuse(problems: Iterable[str]) -> None:
    """Raise ConfigError if there are problems; each is named once."""
    if found := dict.fromkeys(problems):
        raise ConfigError(*found)


def broken(*rules: tuple[object, str]) -> Iterator[str]:
    """Yield the problem of each broken rule. A rule is a pair: what is true if it is broken, and the problem."""
    return (problem for is_broken, problem in rules if is_broken)


class Unrecoverable(DistillError):
    """A failure that would come again: the run is not started once more by itself."""


class TeacherLost(DistillError):
    """No scoring server has answered for as long as a run waits (`model.teacher.patience_s`)."""


class Killed(DistillError):
    """A process was ended from outside, or hung: nothing says that it would happen again."""


class Stopped(BaseException):
    """A signal asked the run to stop; no process was left behind."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
