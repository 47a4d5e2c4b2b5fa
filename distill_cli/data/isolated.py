"""Verifiers and environments in processes of their own: one that hangs, raises or dies costs a sequence its score.

`python -m distill_cli.data.isolated KIND NAME LIMIT_S` is the process: it reads a request a line and writes an answer
and an error, in the order of the requests.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

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
"""Requests that a process has at most: it goes on to the next while its answer is read. All are lost where it dies."""
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
        self._unsent, self._unread = memoryview(b""), b""
        """What is left of the requests to be written, and the beginning of an answer whose end has not come."""
        self.num_starts = 0
        """Whatever a process held is lost to the next one."""

    def ask(self, request: Any) -> Any:
        """The answer. Raises Failed where there is none in time."""
        (answer,) = self.ask_all([request])
        if isinstance(answer, Failed):
            raise answer
        return answer

    def ask_all(self, requests: Sequence[Any]) -> list[Any | Failed]:
        """An answer to each, in their order, or why there is none.

        A process that dies, or leaves a request unanswered for too long, costs that request alone: the next process
        gets those after it.
        """
        answers: list[Any | Failed] = []
        while len(answers) < len(requests):
            try:
                for answer, error in self._exchange(requests[len(answers) :]):
                    answers.append(answer if error is None else Failed(error))
            except (OSError, EOFError, ValueError) as failure:
                answers.append(Failed(f"{type(failure).__name__}: {failure}"))
        return answers

    def start(self) -> None:
        if self._process is None:
            command = [sys.executable, "-m", "distill_cli.data.isolated", *self._argv]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            os.set_blocking(self._process.stdin.fileno(), False)
            self._unsent, self._unread = memoryview(b""), b""
            self.num_starts += 1
            try:
                while not self._transfer(START_S):  # ready
                    pass
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """End the process; another starts with the next use."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _exchange(self, requests: Sequence[Any]) -> Iterator[list]:
        """Answer and error to each, as they come; the limit is the oldest request's, from the last answer on."""
        num_sent = num_answered = 0
        try:
            self.start()
            while num_answered < len(requests):
                if not self._unsent and num_sent - num_answered <= NUM_AHEAD // 2:
                    ahead = requests[num_sent : num_answered + NUM_AHEAD]
                    num_sent += len(ahead)
                    self._unsent = memoryview(b"".join(json.dumps(request).encode() + b"\n" for request in ahead))
                for line in self._transfer(self._limit_s + GRACE_S):
                    answered = json.loads(line)
                    num_answered += 1
                    yield answered
        finally:
            if num_answered < len(requests):  # what it may still say would be taken for the next one's answer
                self.close()

    def _transfer(self, limit_s: float) -> list[bytes]:
        """Write what the pipe takes and read what it has, once one of them can be done: -> the lines that are whole.

        Neither waits for the other, so that a process that hangs cannot keep a write from its end.
        """
        to, of = self._process.stdin.fileno(), self._process.stdout.fileno()
        pipes = select.poll()
        pipes.register(of, select.POLLIN)
        if self._unsent:
            pipes.register(to, select.POLLOUT)
        ready = dict(pipes.poll(limit_s * 1000))
        if not ready:
            raise TimeoutError(f"no answer within {limit_s:g} s")
        if to in ready:
            try:
                self._unsent = self._unsent[os.write(to, self._unsent) :]
            except BrokenPipeError:  # it died, and may have answered some before
                self._unsent = memoryview(b"")
        if of not in ready:
            return []
        came = os.read(of, 1 << 16)
        if not came:
            raise EOFError("its process died")
        *lines, self._unread = (self._unread + came).split(b"\n")
        return lines


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
