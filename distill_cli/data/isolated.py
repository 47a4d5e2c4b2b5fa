"""A verifier in a process of its own: one that hangs, raises or dies costs an answer its score and nothing more.

`python -m distill_cli.data.isolated NAME` is the process: it reads [response, answer] a line and writes [score, error].
"""

from __future__ import annotations

import json
import logging
import os
import resource
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from distill_cli.data.registry import resolve_verifier
from distill_cli.processes import die_with_parent

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


class IsolatedVerifier:
    """Calls a verifier in another process: one that fails scores 0 and is counted.

    The process starts at the first use and is started again where it died.
    """

    def __init__(self, name: str, *, limit_s: float = LIMIT_S) -> None:
        self.name, self.limit_s = name, limit_s
        self.function = resolve_verifier(name)
        """The verifier itself, for what else its module has (`resolve_extract`)."""
        self.num_errors = 0
        """Answers that could not be judged, since whoever counts them last set it to 0."""
        self._num_failed = 0
        self._process: subprocess.Popen | None = None

    def __call__(self, response: str, answer: str) -> float:
        try:
            score, error = self._ask(response, answer)
        except (OSError, EOFError, TimeoutError, ValueError) as failure:
            score, error = 0.0, f"{type(failure).__name__}: {failure}"
            self.close()
        if error is not None:
            self.num_errors += 1
            self._num_failed += 1
            if self._num_failed in (1, 10, 100) or self._num_failed % 1000 == 0:
                said = "data.verifier=%s: %d answers could not be judged and score 0; the last: %s"
                log.warning(said, self.name, self._num_failed, error)
        return score

    def close(self) -> None:
        """End the process; another starts with the next use."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process.stdin.close()
            self._process.stdout.close()
            self._process = None

    def _ask(self, response: str, answer: str) -> tuple[float, str | None]:
        if self._process is None:
            command = [sys.executable, "-m", "distill_cli.data.isolated", self.name, str(self.limit_s)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._read(START_S)  # ready
        self._process.stdin.write(json.dumps([response, answer]).encode() + b"\n")
        self._process.stdin.flush()
        score, error = self._read(self.limit_s + GRACE_S)
        return score, error

    def _read(self, limit_s: float) -> list:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(limit_s):
                raise TimeoutError(f"no score within {limit_s:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise EOFError("its process died")
        return json.loads(line)


def main() -> None:
    """The process."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, limit_s = sys.argv[1], float(sys.argv[2])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a verifier prints is no score
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    verify = resolve_verifier(name)
    if name == "math":
        verify("0", "0")  # imports the library before the clock runs
    out.write("[]\n")
    for line in sys.stdin:
        try:
            with time_limit(limit_s):
                answer = [float(verify(*json.loads(line))), None]
        except (Exception, OutOfTime) as error:
            answer = [0.0, f"{type(error).__name__}: {error}"[:300]]
        out.write(json.dumps(answer) + "\n")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise OutOfTime(f"no score within {seconds:g} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
