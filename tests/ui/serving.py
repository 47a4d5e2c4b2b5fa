"""`distill ui` as a process of its own, and runs that it shows."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill_cli.folders.run_dir import Element, RunDir, SweepDir, element_name
from tests.report.made import make_run

CONFIG = (
    "loss: {kl_type: mixed, topk: 64, kl_weight: 0.5, tail: bucket}\n"
    "model: {student: {path: hub/pupil}, teacher: {path: hub/master}}\ntrain: {max_steps: 40}\n"
)


@contextmanager
def serving(root: Path, *, port: int = 0) -> Iterator[str]:
    """Yield the address of a page about the runs below a folder."""
    command = [sys.executable, "-m", "distill_cli", "ui", str(root), "--port", str(port), "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield next(word for word in process.stdout.readline().split() if word.startswith("http://"))
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")


def make_running(folder: Path, *, num_steps: int = 12, **more: Any) -> RunDir:
    """Write a run that lasts as long as this process."""
    run = make_run(folder, num_steps=num_steps, config=CONFIG, **more)
    run.outcome.unlink()
    (folder / ".lock").write_text(f"process {os.getpid()} on {platform.node()}")
    run = run.next_attempt()
    run.beat("sample 40")
    return run


def append(run: RunDir, *steps: int, **values: float) -> None:
    """Add steps to a run: its last row again, with other values."""
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    with run.metrics.open("a") as file:
        file.writelines(json.dumps(last | {"step": step, "time": 1.0 * step} | values) + "\n" for step in steps)


def make_sweep(folder: Path, values: Sequence[float], *, finished: int) -> SweepDir:
    """Write a sweep over loss.kl_weight whose first runs have finished; the others have not begun."""
    swept = [[f"loss.kl_weight={value}"] for value in values]
    elements = [Element(index, element_name(index, words), words) for index, words in enumerate(swept)]
    sweep = SweepDir(folder)
    sweep.write(command=["distill", "-m"], elements=elements)
    for element, value in list(zip(elements, values, strict=True))[:finished]:
        config = CONFIG.replace("kl_weight: 0.5", f"kl_weight: {value}")
        make_run(folder / element.folder, config=config, seed=element.index, slowness=5 + element.index, recorded=())
    return sweep
