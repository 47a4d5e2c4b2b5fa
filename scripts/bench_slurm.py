"""Sweeps of a hundred to a thousand runs on a real Slurm, each a task that does nothing: what each part costs.

`scripts/slurm_cluster.sh run python scripts/bench_slurm.py` prints one line a size. Folders are made and submitted as
those of a sweep are, and states are asked as `--wait` asks. `--run-to-the-end 1000` follows that many to their end as
`--wait` does, and counts how often a file of a run is opened for it. Composing and checking are measured apart.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from distill_cli.config.compose import compose
from distill_cli.config.variation import override
from distill_cli.folders.run_dir import Element, JobEnd, RunDir, SweepDir, create, environment, write_json
from distill_cli.jobs.prepare import resolve_jobs
from distill_cli.jobs.submit import wait_for_sweep
from distill_cli.launch.slurm import Slurm


def do_nothing(run: str) -> None:
    """A task that ends as a run does, without having done anything."""
    import submitit

    end = JobEnd(submitit.JobEnvironment().job_id, 0, None)
    write_json(RunDir(Path(run)).job_end, asdict(end))
    write_json(RunDir(Path(run)).outcome, {"state": "finished"})


slurm = Slurm()
slurm.task = do_nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[100, 300, 1000])
    parser.add_argument("--run-to-the-end", type=int, default=0, help="let the sweep of this size run")
    arguments = parser.parse_args()
    (job,), _ = resolve_jobs(compose(["cluster=slurm", "cluster.slurm.cpus_per_node=1"]))
    begin = time.perf_counter()
    jobs = compose([f"train.seed={','.join(map(str, range(20)))}"], ["--multirun"])
    composed = time.perf_counter()
    resolve_jobs(jobs)
    checked = time.perf_counter()
    print(
        f"compose {(composed - begin) / 20 * 1000:.1f} ms a run, check {(checked - composed) / 20 * 1000:.1f} ms a run"
    )
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            measure(job.config, Path(folder), size, hold=size != arguments.run_to_the_end)


def measure(config, folder: Path, size: int, *, hold: bool) -> None:
    config = override(config, {"cluster.slurm.extra": {"hold": True} if hold else {}})
    sweep, begin = SweepDir(folder / "sweep"), time.perf_counter()
    elements = [Element(index, f"{index}_seed={index}", [f"train.seed={index}"]) for index in range(size)]
    env = environment()
    runs = [create(sweep.path / element.folder, command=["distill"], env=env) for element in elements]
    sweep.write(command=["distill"], elements=elements)
    made = time.perf_counter()
    jobs = slurm.submit(config, runs, folder=sweep.path)
    for run, job in zip(runs, jobs, strict=True):
        write_json(run.job, asdict(job))
    submitted = time.perf_counter()
    states = slurm.status([job.job_id for job in jobs])
    asked = time.perf_counter()
    assert len(states) == size or not hold
    told = ""
    if hold:
        slurm.ask("scancel", jobs[0].job_id.partition("_")[0])
    else:
        counting.clear()
        cpu, failed = time.process_time(), wait_for_sweep(runs, jobs, console=Console(file=io.StringIO()))
        assert not failed
        opened = Counter(Path(path).relative_to(sweep.path).parts[0] for path in counting if str(sweep.path) in path)
        told = (
            f", to the end {time.perf_counter() - asked:.1f} s, following them {time.process_time() - cpu:.2f} s CPU"
            f"; files opened of a run: at most {max(opened.values())}"
        )
    print(
        f"{size:5d} runs: folders {made - begin:6.2f} s, submit {submitted - made:6.2f} s, one look at all states "
        f"{asked - submitted:6.3f} s{told}",
        flush=True,
    )


counting: list[str] = []
"""Every file that this process opens."""


def count_opens(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str):
        counting.append(arguments[0])


if __name__ == "__main__":
    sys.addaudithook(count_opens)
    main()
