"""Check on a GPU everything that needs one, in stages, in the order of what a failure costs a user.

    python scripts/gpu_acceptance.py --out gpu_results             # every stage, on one GPU
    python scripts/gpu_acceptance.py --only b,c --minutes 4        # some stages, within a time limit
    python scripts/gpu_acceptance.py --rehearse                    # the same code on the CPU, with tiny shapes
    python scripts/gpu_acceptance.py --write-docs gpu_results/results.json

Each stage runs in its own process with a time limit. Its figures are in results.json within a second: a run that is cut
off loses only what its last stage had not measured yet. A later run into the same folder adds its stages. If a stage
fails, hangs or runs out of memory, one line has its error and the path of its log, and the next stage starts. The table
shows each figure, its target and whether it was met; a missed target is not a failure.

Exit status: 0 if every started stage passed, 1 if one failed or was cut off, 2 if the command is wrong or there is no
GPU. `--write-docs` writes a finished results.json into docs/performance.md and starts nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from gpu_stages import STAGES
from gpu_stages.docs import write_docs
from gpu_stages.figures import figure_line

from distill_cli.folders.run_dir import write_json
from distill_cli.machine import hardware
from distill_cli.machine.processes import describe_exit

REPOSITORY = Path(__file__).parent.parent
POLL_S = 0.5
BUSY = 4
"""Factor on the time limits in a rehearsal, whose cores may be shared."""
MACHINE_S = 120.0
STACKS_S = 2.0
TAIL_CHARACTERS = 6000
SCRATCH_GIB = 16
"""Disk space for two random models of 1.7B and 4B parameters."""


def main() -> None:
    arguments = parse()
    if arguments.write_docs:
        sys.exit(write_docs(arguments.write_docs, REPOSITORY / "docs" / "performance.md"))
    if not arguments.rehearse and not hardware.visible_gpus():
        print("error: no GPU is visible: run on a machine with one, or use --rehearse on the CPU", file=sys.stderr)
        sys.exit(2)
    chosen = [name for name in STAGES if name in arguments.only and name not in arguments.skip]
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-", dir=scratch_root(arguments)) as scratch:
        run = Run(arguments, Path(scratch))
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda *_: sys.exit(1))  # `run_process` ends the current stage on the way out
        if arguments.rehearse:
            print("rehearsal on the CPU with tiny shapes: the figures say nothing about speed", flush=True)
        run.look_at_machine()
        for name in chosen:
            run.stage(name)
    sys.exit(run.status())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="stages: " + "; ".join(f"{name} {stage.title}" for name, stage in STAGES.items()),
    )

    def stages(text: str) -> list[str]:
        names = [name for name in text.replace(",", " ").split() if name]
        unknown = [name for name in names if name not in STAGES]
        if unknown:
            raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
        return names

    parser.add_argument("--only", type=stages, default=list(STAGES), metavar="a,b", help="run these stages")
    parser.add_argument("--skip", type=stages, default=[], metavar="a,b", help="leave these out")
    parser.add_argument("--minutes", type=float, default=0.0, help="leave out stages that do not fit; 0 is no limit")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU, with tiny shapes")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="folder of results.json and the logs")
    parser.add_argument("--work", type=Path, help="scratch folder; default: shared memory if there is room, else /tmp")
    parser.add_argument("--commit", help="commit of this code, if git does not know it")
    parser.add_argument("--write-docs", type=Path, metavar="RESULTS", help="write it into docs/performance.md")
    arguments = parser.parse_args()
    if arguments.minutes < 0:
        parser.error(f"--minutes {arguments.minutes:g}: must be 0 or more")
    return arguments


def scratch_root(arguments: argparse.Namespace) -> Path | None:
    if arguments.work or arguments.rehearse:
        return arguments.work
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and shutil.disk_usage(shared).free > SCRATCH_GIB * 2**30 else None


class Run:
    """Run stages one after the other and keep their results."""

    def __init__(
        self, arguments: argparse.Namespace, scratch: Path, *, command: Callable[..., list[str]] | None = None
    ) -> None:
        """
        Args:
            command: builds a stage's command line, as `stage_command` does; tests pass their own.
        """
        self.arguments, self.scratch, self.out = arguments, scratch, arguments.out.resolve()
        self.command = command or stage_command
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = self.out / "results.json"
        self.deadline = time.monotonic() + arguments.minutes * 60 if arguments.minutes else float("inf")
        self.temporary = scratch / "tmp"
        self.temporary.mkdir(exist_ok=True)
        self.origin = {"command": " ".join(["python", *sys.argv]), "commit": arguments.commit or commit()}
        before = json.loads(self.file.read_text()) if self.file.exists() else {}
        if before.get("rehearsal") != arguments.rehearse:
            before = {}
        self.results: dict[str, Any] = {
            "rehearsal": arguments.rehearse,
            "machine": before.get("machine", {}),
            "stages": before.get("stages", {}),
        }
        self.started: list[str] = []

    def look_at_machine(self) -> None:
        """Record card and versions."""
        found = self.run_process("machine", limit_s=MACHINE_S)
        self.keep_machine(found.get("facts", {}))
        print(" ".join(f"{key}={value}" for key, value in self.results["machine"].items()), flush=True)
        if found["error"]:
            print(f"   {found['state']}: {found['error']}", flush=True)

    def stage(self, name: str) -> None:
        """Run one stage to its end or limit, and print what it found."""
        spec, left = STAGES[name], self.deadline - time.monotonic()
        needed = spec.rehearsal_s if self.arguments.rehearse else spec.needs_s
        if left < needed:
            lacking = f"needs about {needed:.0f} s and {max(left, 0):.0f} are left"
            print(f"{name}  {spec.title}: left out, {lacking}", flush=True)
            if name not in self.results["stages"]:
                self.note(name, {"state": "left out"})
            return
        print(f"{name}  {spec.title}", flush=True)
        self.started.append(name)
        self.note(name, {"state": "cut off"})  # what is on disk if this process is killed
        limit_s = spec.limit_s * (BUSY if self.arguments.rehearse else 1)
        found = self.run_process(name, limit_s=min(limit_s, left))
        self.note(name, found)
        for figure in found.get("figures", []):
            print(f"   {figure_line(figure)}", flush=True)
        if found["state"] != "passed":
            print(f"   {found['state']}: {found['error']}; log: {found['log']}", flush=True)
        print(f"   {found['seconds']:.0f} s", flush=True)

    def keep_machine(self, facts: dict[str, str]) -> None:
        """Drop earlier figures if they are from another card or other versions."""
        before = self.results["machine"]
        if facts and before and before != facts:
            self.results["stages"] = {}
            print(f"{self.file}: earlier figures are from another machine and are replaced", flush=True)
        self.results["machine"] = facts or before
        self.save()

    def run_process(self, name: str, *, limit_s: float) -> dict[str, Any]:
        """Run a stage's process; return its state, seconds, error and log path, and what it recorded."""
        report = self.scratch / f"{name}.json"
        log = (self.out if name in STAGES else self.scratch) / f"{name}.log"
        command = self.command(name, report, self.scratch, rehearse=self.arguments.rehearse)
        environment = {**os.environ, "PYTHONPATH": search_path(), "PYTHONUNBUFFERED": "1"}
        environment["TMPDIR"] = str(self.temporary)
        if self.arguments.rehearse:  # tiny models gain nothing from a second thread
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        begin, since = time.monotonic(), time.time()
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        error = ""
        try:
            while process.poll() is None:
                self.watch(name, report)
                if time.monotonic() - begin > limit_s:
                    error = f"took longer than {limit_s:.0f} s"
                    break
                time.sleep(POLL_S)
        finally:
            end_tree(process)
        found = read(report)
        died = "" if process.returncode == 0 else describe_exit(process.returncode)
        error = error or found.pop("error", "") or died
        state = "cut off" if error.startswith("took longer") else "failed" if error else "passed"
        if error:
            append_tails(log, self.scratch, since=since)
        return {
            "title": STAGES[name].title if name in STAGES else name,
            "state": state,
            "seconds": time.monotonic() - begin,
            "error": error,
            "log": str(log),
            **found,
        }

    def watch(self, name: str, report: Path) -> None:
        found = read(report)
        if name in self.started and found:
            self.note(name, {"state": "cut off", **found})

    def note(self, name: str, found: Mapping[str, Any]) -> None:
        self.results["stages"][name] = {"title": STAGES[name].title, **self.origin, **found}
        self.save()

    def save(self) -> None:
        write_json(self.file, self.results)

    def status(self) -> int:
        stages = self.results["stages"]
        bad = [name for name in self.started if stages[name]["state"] != "passed"]
        figures = [figure for name in self.started for figure in stages[name].get("figures", [])]
        missed = [figure["name"] for figure in figures if figure["is_met"] is False]
        print(f"{len(self.started) - len(bad)} of {len(self.started)} stages passed; results: {self.file}")
        if missed:
            print(f"missed: {'; '.join(missed)}")
        return 1 if bad else 0


def stage_command(name: str, report: Path, scratch: Path, *, rehearse: bool) -> list[str]:
    """Return the command line of a stage's process."""
    command = [sys.executable, "-m", "gpu_stages", name, str(report), str(scratch)]
    return [*command, "--rehearse"] if rehearse else command


def search_path() -> str:
    """Return PYTHONPATH for the stages: `gpu_stages`, the package and its tests, then the caller's own."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(REPOSITORY / "scripts"), str(REPOSITORY), *([given] if given else [])])


def commit() -> str:
    """Return the checkout's short hash, or `unknown` without git or its history."""
    try:
        done = subprocess.run(
            ["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def read(report: Path) -> dict[str, Any]:
    return json.loads(report.read_text()) if report.exists() else {}


def end_tree(process: subprocess.Popen) -> None:
    """Kill a stage's process tree; a stage that is still running first writes its threads' stacks to its log."""
    try:
        tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        tree = []
    if process.poll() is None:
        process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks
        with suppress(subprocess.TimeoutExpired):
            process.wait(STACKS_S)
        process.kill()
    for member in tree:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def append_tails(log: Path, scratch: Path, *, since: float) -> None:
    """Append the last output of a stage's processes to its log, since the scratch folder is deleted."""
    files = [file for pattern in ("*.out", "*.log") for file in scratch.rglob(pattern)]
    with log.open("a") as output:
        for file in sorted(file for file in files if file.stat().st_mtime >= since and file != log):
            text = file.read_text(errors="replace")[-TAIL_CHARACTERS:]
            output.write(f"\n===== {file.relative_to(scratch)}\n{text}\n")


if __name__ == "__main__":
    main()
