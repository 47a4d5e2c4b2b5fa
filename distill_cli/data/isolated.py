"""Run verifiers and environments in separate processes, with time limits.

`python -m distill_cli.data.isolated KIND NAME LIMIT_S SOCKET` reads lines of requests and writes a line with an answer
and an error for each request, in order. pebble's pool cannot replace it: it fails everything queued if a process dies
before its acknowledgement was read, and for good if an idle one is killed.
"""

import itertools
import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.machine.processes import die_with_parent
from distill_cli.types import Example

log = logging.getLogger(__name__)

LIMIT_S = 5.0
"""Seconds for one answer. An alarm within the process ends it; a process that ignores the alarm is killed."""
GRACE_S = 1.0
START_S = 60.0
"""Seconds for the process to import what it needs."""
NUM_AHEAD = 64
"""Requests sent to a process at a time: it works on the next one while an answer is read. If it dies, the next process
gets those without an answer."""
MEMORY_BYTES = 4 << 30
"""Address space of the process: an answer such as 9**9**9 fails instead of exhausting the machine's memory."""


class OutOfTime(BaseException):
    """Not an Exception, which a library may catch and ignore."""


class Failed(Exception):
    """A request has no answer; the message says why."""


@dataclass
class Failures:
    """Count failures, and warn of the first, tenth, hundredth and every thousandth."""

    what: str
    """The warning, with a place for the number."""
    num_new: int = 0
    """Failures since the last `take`."""
    num_all: int = 0

    def add(self, error: Exception) -> None:
        self.num_new += 1
        self.num_all += 1
        if self.num_all in (1, 10, 100) or self.num_all % 1000 == 0:
            reason = error if isinstance(error, Failed) else f"{type(error).__name__}: {error}"
            log.warning("%s; the last: %s", self.what.format(self.num_all), reason)

    def take(self) -> int:
        new, self.num_new = self.num_new, 0
        return new


class Worker:
    """A process and the socket to it. The process starts at the first use, and again after it died."""

    def __init__(self, kind: str, name: str, *, limit_s: float) -> None:
        self._argv, self._limit_s = [kind, name, str(limit_s)], limit_s
        self._process: subprocess.Popen | None = None
        self.num_ends = 0
        """Processes that ended so far; each loses its state."""

    def ask(self, requests: Sequence[Any]) -> list[Any | Failed]:
        """Return an answer to each request, in their order, or why there is none.

        A process that dies, or leaves a request unanswered for too long, costs that request alone: the next process
        gets those after it.
        """
        answers: list[Any | Failed] = []
        while (begin := len(answers)) < len(requests):
            batch = requests[begin : begin + NUM_AHEAD]
            try:
                self._start()
                # Read whole before the first answer: neither side waits for the other.
                self._socket.sendall(json.dumps(batch).encode() + b"\n")
                for _ in batch:
                    answer, error = self._read(self._limit_s + GRACE_S)  # from the answer before it on
                    answers.append(answer if error is None else Failed(error))
            except BaseException as failure:
                self.close()  # a late answer would be taken for the next request's
                if not isinstance(failure, OSError | EOFError | ValueError):
                    raise
                answers.append(Failed(f"{type(failure).__name__}: {failure}"))
        return answers

    def _start(self) -> None:
        """Start the process unless it runs, and block until it is ready."""
        if self._process is not None:
            return
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "distill_cli.data.isolated", *self._argv, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._answers = self._socket.makefile("rb")
        self._read(START_S)

    def close(self) -> None:
        """End the process; another starts with the next use."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._answers.close()
            self._socket.close()
            self._process = None
            self.num_ends += 1

    def _read(self, limit_s: float) -> list[Any]:
        self._socket.settimeout(limit_s)
        try:
            line = self._answers.readline()
        except TimeoutError:
            raise TimeoutError(f"no answer within {limit_s:g} s") from None
        if not line:
            raise EOFError("its process died")
        return json.loads(line)


class IsolatedVerifier:
    """Calls a verifier in another process; a failure scores 0 and is counted."""

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        self.function = resolve_verifier(name)
        """The verifier itself, for `resolve_extract`."""
        self.failures = Failures(f"data.verifier={name}: {{}} answers could not be judged and score 0")
        self._worker = Worker("verifier", name, limit_s=limit_s)
        self.close = self._worker.close

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Return the score of each (response, right answer)."""
        answers = self._worker.ask(pairs)
        for failure in (answer for answer in answers if isinstance(answer, Failed)):
            self.failures.add(failure)
        return [0.0 if isinstance(answer, Failed) else answer for answer in answers]


class IsolatedEnvironments:
    """Makes environments that share another process; a failing one raises `Failed`.

    If one takes the process down, the others are made again and replay their responses, which give the same
    observations.
    """

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        resolve_environment(name)  # raises ConfigError if there is none
        self.worker = Worker("environment", name, limit_s=limit_s)
        self.close = self.worker.close
        self._numbers, self._free = itertools.count(), list[int]()

    def make(self) -> Environment:
        """Return an environment, whose number in the process is free again once nothing refers to it."""
        number = self._free.pop() if self._free else next(self._numbers)
        environment = _IsolatedEnvironment(self.worker, number)
        weakref.finalize(environment, self._free.append, number)
        return environment


class _IsolatedEnvironment:
    def __init__(self, worker: Worker, number: int) -> None:
        self._worker, self._number = worker, number
        self._requests: list[dict[str, Any]] = []
        """All since the reset."""
        self._num_ends = 0
        """`Worker.num_ends` of the process that knows this environment."""

    def reset(self, example: Example) -> str:
        self._requests.clear()
        return self._ask(example=asdict(example))

    def step(self, response: str) -> Observation:
        return Observation(**self._ask(response=response))

    def _ask(self, **request: Any) -> Any:
        self._requests.append({"number": self._number, **request})
        is_known, self._num_ends = self._num_ends == self._worker.num_ends, self._worker.num_ends
        *_, answer = self._worker.ask(self._requests[-1:] if is_known else self._requests)
        if isinstance(answer, Failed):
            raise answer
        return answer


def main() -> None:
    """Answer requests until the rank closes its socket."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    kind, name, limit_s, descriptor = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    os.set_inheritable(descriptor, False)
    rank = socket.socket(fileno=descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer = judge(name) if kind == "verifier" else play(name)
    rank.sendall(b"[]\n")  # ready
    for line in rank.makefile("rb"):
        for request in json.loads(line):
            rank.sendall(json.dumps(reply_to(request, answer, limit_s=limit_s)).encode() + b"\n")


def reply_to(request: Any, answer: Callable[[Any], Any], *, limit_s: float) -> list[Any]:
    """Return the answer and None, or None and the error. OutOfTime is raised in `answer` after `limit_s`."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"no answer within {limit_s:g} s")

    try:
        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            return [answer(request), None]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (Exception, OutOfTime) as error:
        return [None, f"{type(error).__name__}: {error}"[:300]]


def judge(name: str) -> Callable[[list[str]], float]:
    """Return a function that answers [response, answer] with a score."""
    verify = resolve_verifier(name)
    if name == "math":
        verify("0", "0")  # imports the library before the clock runs
    return lambda request: finite(verify(*request))


def play(name: str) -> Callable[[dict[str, Any]], Any]:
    """Return a function that answers an example with the first message, and a response with an observation."""
    make, environments = resolve_environment(name), dict[int, Environment]()

    def answer(request: dict[str, Any]) -> Any:
        number, example = request["number"], request.get("example")
        if example is not None:
            environments[number] = make()
            opening = environments[number].reset(Example(**{**example, "messages": tuple(example["messages"])}))
            if not isinstance(opening, str):
                raise TypeError(f"reset must return a text, not {type(opening).__name__}")
            return opening
        seen = environments[number].step(request["response"])
        if not isinstance(getattr(seen, "text", None), str):
            raise TypeError(f"step must return an Observation with a text, not {seen!r}"[:200])
        reward = None if seen.reward is None else finite(seen.reward)
        return {"text": seen.text, "reward": reward, "done": bool(seen.done)}

    return answer


def finite(score: Any) -> float:
    """Return the score as a number. Raises ValueError for NaN and infinity."""
    value = float(score)
    if not math.isfinite(value):
        raise ValueError(f"a score of {value}")
    return value


if __name__ == "__main__":
    main()
