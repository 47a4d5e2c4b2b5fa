"""torchrun, which names the ranks that were killed: `python -m distill_cli.launch.agent RUN ATTEMPT <its arguments>`.

A rank that raises writes `rank_<n>.error.json` itself. One that is killed cannot, and only the process that torchrun
runs in learns its exit status. The ranks' errors are not written by torch's `@record`: it needs torch before their
output is redirected, and its times are whole seconds, within which several ranks may fail.
"""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_cli.folders.run_dir import RunDir, write_json
from distill_cli.launch.local import GRACE_S


def main() -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    path, attempt, *arguments = sys.argv[1:]
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        record_killed(error.failures, RunDir(Path(path), attempt=int(attempt)))
        raise


def record_killed(failures: Mapping[int, Any], run: RunDir) -> None:
    """Write an error file for each rank that was killed, but not by torchrun.

    After the first failure torchrun sends SIGTERM to the other ranks, and SIGKILL 30 s later.

    Args:
        failures: torch's `ProcessFailure` of each rank that did not exit with status 0.
    """
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        by_torchrun = failure.exitcode == -signal.SIGTERM or failure.timestamp > first + GRACE_S
        if failure.exitcode < 0 and not by_torchrun:
            # Time 0 sorts it before the errors of ranks that waited for it.
            write_json(run.rank_error(rank), {"time": 0.0, "kind": "Killed", "status": failure.exitcode})


if __name__ == "__main__":
    main()
