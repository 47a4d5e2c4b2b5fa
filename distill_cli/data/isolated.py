"""Verifiers and environments in processes of their own: one that hangs, raises or dies costs a sequence its score.

`python -m distill_cli.data.isolated KIND NAME LIMIT_S SOCKET` is the process: it reads a line of requests and writes a
line with an answer and an error for each, in their order. pebble's pool is no replacement: it fails everything queued
if a process dies before its acknowledgement was read, and for good if an idle one is killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import IO, Any

from distill_cli.data.environments import Environment, Observation
from distill_cli.data.registry import resolve_environment, resolve_verifier
from distill_cli.machine.processes import die_with_parent
from distill_cli.types import Example

log = logging.getLogger(__name__)

LIMIT_S = 5.0
"""Seconds for one answer. Within the process an alarm ends it; a process that does not answer to that is killed."""
GRACE_S = 1.0
START_S = 60.0
"""Seconds for the process to import what it needs."""
NUM_AHEAD = 64
"""Requests that a process is sent at a time: it goes on to the next while its answer is read. A process that dies loses
them, and the next one gets those without an answer."""
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
    """The process and the socket to it. It starts at the first use, and again after it died."""

    def __init__(self, kind: str, name: str, *, limit_s: float) -> None:
        self._argv, self._limit_s = [kind, name, str(limit_s)], limit_s
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket
        self._answers: IO[bytes]
        self.num_starts = 0
        """Each start loses whatever the process before it held."""

    def ask(self, request: Any) -> Any:
        """Return the answer. Raises Failed if there is none in time."""
        (answer,) = self.ask_all([request])
        if isinstance(answer, Failed):
            raise answer
        return answer

    def ask_all(self, requests: Sequence[Any]) -> list[Any | Failed]:
        """Return an answer to each request, in their order, or why there is none.

        A process that dies, or leaves a request unanswered for too long, costs that request alone: the next process
        gets those after it.
        """
        answers: list[Any | Failed] = []
        while (begin := len(answers)) < len(requests):
            try:
                for answer, error in self._exchange(requests[begin : begin + NUM_AHEAD]):
                    answers.append(answer if error is None else Failed(error))
            except (OSError, EOFError, ValueError) as failure:
                answers.append(Failed(f"{type(failure).__name__}: {failure}"))
        return answers

    def start(self) -> None:
        if self._process is not None:
            return
        self._socket, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "distill_cli.data.isolated", *self._argv, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self._answers = self._socket.makefile("rb")
        self.num_starts += 1
        with self._closing_on_error():
            self._read(START_S)  # ready

    def close(self) -> None:
        """End the process; another starts with the next use."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._answers.close()
            self._socket.close()
            self._process = None

    def _exchange(self, requests: Sequence[Any]) -> Iterator[list]:
        """Yield answer and error of each request; the limit of one begins with the answer to the one before it."""
        message = json.dumps(requests).encode() + b"\n"
        self.start()
        with self._closing_on_error():
            self._socket.sendall(message)  # read whole before the first answer: neither waits for the other
            for _ in requests:
                yield self._read(self._limit_s + GRACE_S)

    def _read(self, limit_s: float) -> list:
        self._socket.settimeout(limit_s)
        try:
            line = self._answers.readline()
        except TimeoutError:
            raise TimeoutError(f"no answer within {limit_s:g} s") from None
        if not line:
            raise EOFError("its process died")
        return json.loads(line)

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        """End the process after an error: what it may still answer would be taken for the next request's answer."""
        try:
            yield
        except BaseException:
            self.close()
            raise


class IsolatedVerifier:
    """Calls a verifier in another process: one that fails scores 0 and is counted."""

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        self.name = name
        self.function = resolve_verifier(name)
        """The verifier itself, for what else its module has (`resolve_extract`)."""
        self.failures = Failures(f"data.verifier={name}: {{}} answers could not be judged and score 0")
        self._worker = Worker("verifier", name, limit_s=limit_s)

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """The score of each response by the right answer beside it."""
        scores = self._worker.ask_all(pairs)
        for place, score in enumerate(scores):
            if isinstance(score, Failed):
                self.failures.add(score)
                scores[place] = 0.0
        return scores

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
    kind, name, limit_s, descriptor = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    os.set_inheritable(descriptor, False)
    rank = socket.socket(fileno=descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answer = judge(name) if kind == "verifier" else play(name)
    rank.sendall(b"[]\n")
    for line in rank.makefile("rb"):
        for request in json.loads(line):
            try:
                with time_limit(limit_s):
                    answered = [answer(request), None]
            except (Exception, OutOfTime) as error:
                answered = [None, f"{type(error).__name__}: {error}"[:300]]
            rank.sendall(json.dumps(answered).encode() + b"\n")


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
