"""The process that uses W&B's library, commanded over a socket: see `track.wandb`.

python -m distill_cli.track.wandb_process SOCKET PARENT

A process of its own, since that library replaces sys.exit and the hook for exceptions, waits for its service at exit
without limit, sends SIGINT to the main thread if someone clicks on "stop", and leaves its socket to child processes.
"""

import glob
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_cli.machine.child_process import connect_to_parent
from distill_cli.machine.processes import die_with_parent

INIT_S = 15.0
"""How long the server may take to answer."""


class Session:
    """One run at W&B. Each method is a call that the parent may make."""

    def open(self, arguments: Mapping[str, Any], is_live: bool) -> dict[str, Any]:
        """Connect; return the first step that W&B lacks, and the run's address.

        Args:
            is_live: describe and sample this machine; not if it only sends what another one recorded.
        """
        import wandb

        command = Path(arguments["dir"], "command.txt")
        sys.argv = shlex.split(command.read_text()) if command.is_file() else ["distill"]  # W&B shows it
        settings = wandb.Settings(
            program="distill",
            init_timeout=INIT_S,
            console="off",
            silent=True,
            disable_git=True,  # a remote's address may hold a token
            disable_code=True,
            disable_job_creation=True,
            label_disable=True,
            sagemaker_disable=True,  # it would choose another id
            x_save_requirements=False,
            x_disable_meta=not is_live,
            x_disable_stats=not is_live,
            x_stats_pid=os.getppid(),
        )
        self.run: Any = wandb.init(**arguments, settings=settings)
        is_online = not (self.run.offline or self.run.disabled)
        if is_online != (arguments["mode"] == "online"):
            raise RuntimeError(f"W&B does not log {arguments['mode']} here; see its environment variables and settings")
        return {"next_step": self.run.starting_step, "url": self.run.url if is_online else None}

    def log(self, rows: Sequence[Mapping[str, float]]) -> None:
        for row in rows:
            values = {key: value for key, value in row.items() if key not in ("step", "time")}
            if values:
                self.run.log({**values, "_timestamp": row["time"]}, step=int(row["step"]), commit=True)

    def save(self, file: str, base: str) -> None:
        """Upload a file. Its name at W&B is its path from the folder `base`."""
        if not self.run.save(glob.escape(file), base_path=glob.escape(base), policy="now"):
            raise RuntimeError(f"{file}: W&B did not take this file")

    def close(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Return when everything has arrived."""
        import wandb

        self.run.summary.update(dict(summary))
        self.run.finish(exit_code=exit_code)
        wandb.teardown()


class EndsWithParent(subprocess.Popen[Any]):
    """Processes that the kernel kills when this one dies.

    wandb-core watches for that too, but some versions (0.31.0 is one) stay for ever if it happens while they shut down
    without a server. See whether this is still needed: kill this process in `wandb.teardown` with the server away.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "preexec_fn": die_with_parent})


def main() -> None:
    """Answer the parent's calls until it is gone: (error or None, result)."""
    connection, session = connect_to_parent(), Session()
    subprocess.Popen = EndsWithParent  # type: ignore[misc]  # W&B's library starts wandb-core
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            result, failure = getattr(session, name)(*arguments), None
        except (Exception, SystemExit) as error:
            result, failure = None, str(error).strip() or type(error).__name__
        connection.send((failure, result))


if __name__ == "__main__":
    main()
