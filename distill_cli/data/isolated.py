"""Verifiers and environments in processes of their own: one that hangs, raises or dies costs a sequence its score.

`python -m distill_cli.data.isolated KIND NAME LIMIT_S` is the process: it reads a request a line and writes an answer
and an error.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.processes import die_with_parent
from distill_cli.types import Example

log = logging.getLogger(__name__)

LIMIT_S = 5.0
"""Seconds for one answer. Within the process an alarm ends it; a process that does not answer to that is killed."""
GRACE_S = 1.0
START_S = 60.0
"""Seconds for the process to import what it needs."""
MEMORY_BYTES = 4 << 30
"""Address space of the process: an answer such as 9**9**9 fails instead of taking the machine's memory."""


class OutOfTime(BaseException):
    """No Exception, since a library that catches those would go on."""


class Failed(Exception):
    """What the process was asked could not be answered; the message says why."""


@dataclass
class Failures:
    """Counts what could not be answered, and warns of it now and then."""

    what: str
    """Of what, with a place for their number."""
    num_new: int = 0
    """Since they were last taken."""
    num_all: int = 0

    def add(self, error: Exception) -> None:
        self.num_new += 1
        self.num_all += 1
        if self.num_all in (1, 10, 100) or self.num_all % 1000 == 0:
            said = error if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            log.warning("%s; the last: %s", self.what.format(self.num_all), said)

    def take(self) -> int:
        new, self.num_new = self.num_new, 0
        return new


class Worker:
    """The process. It starts at the first use, and again where it died."""

    def __init__(self, kind: str, name: str, *, limit_s: float) -> None:
        self._argv, self._limit_s = [kind, name, str(limit_s)], limit_s
        self._process: subprocess.Popen | None = None
        self.num_starts = 0
        """Whatever a process held is lost to the next one."""

    def ask(self, request: Any) -> Any:
        """The answer. Raises Failed where there is none in time."""
        try:
            self.start()
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            answer, error = self._read(self._limit_s + GRACE_S)
        except (OSError, EOFError, TimeoutError, ValueError) as failure:
            self.close()
            raise Failed(f"{type(failure).__name__}: {failure}") from failure
        if error is not None:
            raise Failed(error)
        return answer

    def start(self) -> None:
        if self._process is None:
            command = [sys.executable, "-m", "distill_cli.data.isolated", *self._argv]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.num_starts += 1
            self._read(START_S)  # ready

    def close(self) -> None:
        """End the process; another starts with the next use."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _read(self, limit_s: float) -> list:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise TimeoutError(f"no answer within {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("its process died")
        return json.loads(line)


class IsolatedVerifier:
    """Calls a verifier in another process: one that fails scores 0 and is counted."""

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        self.name = name
        self.function = resolve_verifier(name)
        """The verifier itself, for what else its module has (`resolve_extract`)."""
        self.failures = Failures(f"data.verifier={name}: {{}} answers could not be judged and score 0")
        self._worker = Worker("verifier", name, limit_s=limit_s)

    def __call__(self, response: str, answer: str) -> float:
        try:
            return self._worker.ask([response, answer])
        except Failed as error:
            self.failures.add(error)
            return 0.0

    def close(self) -> None:
        """End the process; another starts with the next use."""
        self._worker.close()


class IsolatedEnvironments:
    """Makes environments that live together in another process; what one of them fails at raises `Failed`.

    Where one takes the process with it, the others are made again from what they were told: the same responses give the
    same observations.
    """

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        resolve_environment(name)  # raises here where there is none
        self.worker = Worker("environment", name, limit_s=limit_s)
        self._free: list[int] = []
        self._num = 0

    def make(self) -> Environment:
        if not self._free:
            self._free.append(self._num)
            self._num += 1
        number = self._free.pop()
        return _IsolatedEnvironment(self.worker, number, on_end=self._free.append)

    def close(self) -> None:
        self.worker.close()


class _IsolatedEnvironment:
    """One of them; its place in the process is another's when nobody holds it any more."""

    def __init__(self, worker: Worker, number: int, *, on_end: Callable[[int], None]) -> None:
        self._worker, self._number, self._on_end = worker, number, on_end
        self._lives_in = 0
        """Which start of the process knows it."""
        self._example: Example | None = None
        self._responses: list[str] = []

    def __del__(self) -> None:
        self._on_end(self._number)

    def reset(self, example: Example) -> str:
        self._example, self._responses = example, []
        self._worker.start()
        self._lives_in = self._worker.num_starts
        return self._worker.ask({"number": self._number, "example": asdict(example)})

    def step(self, response: str) -> Observation:
        self._worker.start()
        if self._lives_in != self._worker.num_starts:
            earlier, example = self._responses, self._example
            self.reset(example)
            for told in earlier:
                self.step(told)
        self._responses.append(response)
        return Observation(**self._worker.ask({"number": self._number, "response": response}))


def main() -> None:
    """The process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kind, name, limit_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what it prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer = judge(name) if kind == "verifier" else play(name)
    out.write("[]\n")
    for line in sys.stdin:
        try:
            with time_limit(limit_s):
                answered = [answer(json.loads(line)), None]
        except (Exception, OutOfTime) as error:
            answered = [None, f"{type(error).__name__}: {error}"[:300]]
        out.write(json.dumps(answered) + "\n")


def judge(name: str) -> Callable[[list[str]], float]:
    """Answers [response, answer] with a score."""
    verify = resolve_verifier(name)
    if name == "math":
        verify("0", "0")  # imports the library before the clock runs
    return lambda request: finite(verify(*request))


def play(name: str) -> Callable[[dict[str, Any]], Any]:
    """Answers an example with what is asked first, and a response with what comes of it."""
    make, environments = resolve_environment(name), {}

    def answer(request: dict[str, Any]) -> Any:
        number = request["number"]
        if "example" in request:
            environments[number] = make()
            said = environments[number].reset(example_of(request["example"]))
            if not isinstance(said, str):
                raise TypeError(f"reset must return a text, not {type(said).__name__}")
            return said
        seen = environments[number].step(request["response"])
        if not isinstance(getattr(seen, "text", None), str):
            raise TypeError(f"step must return an Observation with a text, not {seen!r}"[:200])
        return {
            "text": seen.text,
            "reward": None if seen.reward is None else finite(seen.reward),
            "done": bool(seen.done),
        }

    return answer


def example_of(fields: dict[str, Any]) -> Example:
    return Example(**{**fields, "messages": tuple(fields["messages"])})


def finite(score: Any) -> float:
    value = float(score)
    if not math.isfinite(value):
        raise ValueError(f"a score of {value}")
    return value


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime(f"no answer within {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
