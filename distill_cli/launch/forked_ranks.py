"""Fork a node's ranks from torchrun's agent, which has imported what they need, instead of starting new processes.

The imports are the larger part of a rank's start, and its ranks share them and their memory. Only for ranks on CPUs: a
fork does not survive a library that has asked a driver for its devices.

The ranks are forked before torchrun begins, while the agent has no other Python thread, and wait for the environment
that torchrun gives to each.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from distill_cli.machine.processes import die_with_parent, name_process

POLL_S = 0.02


class ForkedRank:
    """A forked process that waits for `begin`; for torchrun it is a `SubprocessHandler` and its `Popen` in one."""

    def __init__(self, main: Callable[[], object]) -> None:
        """Fork; `main` is called in the new process once it may begin, and its end is the process's."""
        self.returncode: int | None = None
        environment, self._begin = os.pipe()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        agent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(main, environment, agent=agent)
        os.close(environment)

    @property
    def proc(self) -> "ForkedRank":
        return self

    def begin(self, env: Mapping[str, str]) -> None:
        """Let the rank begin with these environment variables added."""
        with open(self._begin, "w") as pipe:
            pipe.write(json.dumps(dict(env)) + "\n")

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the rank runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Block until the rank has ended. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(POLL_S)
        return status

    def close(self, death_sig: int) -> None:
        """Send a signal to the rank's session."""
        os.killpg(self.pid, death_sig)


def fork_ranks(arguments: Sequence[str], *, num_ranks: int) -> None:
    """Prepare the program of torchrun's `arguments`, fork its ranks, and let torchrun start these.

    The program is a module: `prepare(argv)` imports what its ranks need, and `main(argv)` is a rank. Standard output is
    the ranks'; from here on what the agent prints goes to its standard error.

    Symptom: torchrun can fork a function itself (`start_method`), but then reports one failed rank only, not the killed
    one that others waited for, gives the others 30 s to end, and has threads when it forks.
    No longer needed when: it reports the exit status of every forked rank, and respects `--shutdown-timeout`.
    """
    name, *argv = arguments[arguments.index("-m") + 1 :]
    output = os.dup(1)
    os.dup2(2, 1)
    program = importlib.import_module(name)
    try:
        program.prepare(argv)
    except Exception:
        traceback.print_exc()  # each rank meets it again, and writes its error file
    ranks = [ForkedRank(partial(_main, program, argv, output)) for _ in range(num_ranks)]
    os.close(output)

    def begin(*, local_rank_id: int, env: Mapping[str, str], **_: object) -> ForkedRank:
        ranks[local_rank_id].begin(env)
        return ranks[local_rank_id]

    from torch.distributed.elastic.multiprocessing import api

    assert callable(api.get_subprocess_handler)
    api.get_subprocess_handler = begin  # type: ignore[assignment]
    skip_method_names()


def skip_method_names() -> None:
    """Let torchrun's rendezvous record its events without the names of the methods that record them.

    Symptom: it finds each name with `inspect.stack`, which searches all modules: half a second once vLLM is imported.
    No longer needed when: `dynamic_rendezvous` has no `get_method_name`.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    if hasattr(dynamic_rendezvous, "get_method_name"):
        dynamic_rendezvous.get_method_name = lambda depth=2: "unknown"


def _main(program: Any, argv: Sequence[str], output: int) -> None:
    os.dup2(output, 1)
    os.close(output)
    sys.argv[:] = [program.__file__, *argv]
    name_process(f"rank_{os.environ['RANK']}")
    program.main(argv)


def _run(main: Callable[[], object], environment: int, *, agent: int) -> None:
    """Wait for the environment, call `main` and exit."""
    status = 1
    try:
        die_with_parent(parent=agent)
        os.setsid()  # torchrun signals a rank's group
        with open(environment) as pipe:
            os.environ.update(json.loads(pipe.readline()))
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)  # what the agent was doing does not go on here
