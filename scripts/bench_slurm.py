"""Measure sweeps of 100 to 1,000 runs on a real Slurm, each a task that does nothing: the cost of each part.

`scripts/slurm_cluster.sh run python scripts/bench_slurm.py` prints one line per size. Folders are made and submitted
like those of a sweep; states are queried like `--wait` does. `--run-to-the-end 1000` follows that many runs to their
end like `--wait`, and counts how often it opens a file of a run. Composing and checking are measured separately.
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
from distill_cli.jobs.new_runs import resolve_jobs
from distill_cli.jobs.submit import wait_for_sweep
from distill_cli.launch.slurm import Slurm


def do_nothing(run: str) -> None:
    """End like a run that has finished, without doing anything."""
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
    compose_ms, check_ms = ((composed - begin) / 20 * 1000, (checked - composed) / 20 * 1000)
    print(f"compose {compose_ms:.1f} ms per run, check {check_ms:.1f} ms per run")
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
    queried = time.perf_counter()
    assert len(states) == size or not hold
    followed = ""
    if hold:
        slurm.ask("scancel", jobs[0].job_id.partition("_")[0])
    else:
        counting.clear()
        cpu, failed = time.process_time(), wait_for_sweep(runs, jobs, console=Console(file=io.StringIO()))
        assert not failed
        opened = Counter(Path(path).relative_to(sweep.path).parts[0] for path in counting if str(sweep.path) in path)
        followed = (
            f", to the end {time.perf_counter() - queried:.1f} s, following them {time.process_time() - cpu:.2f} s CPU"
            f"; files opened of a run: at most {max(opened.values())}"
        )
    print(
        f"{size:5d} runs: folders {made - begin:6.2f} s, submit {submitted - made:6.2f} s, one query of all states "
        f"{queried - submitted:6.3f} s{followed}",
        flush=True,
    )


counting: list[str] = []
"""Paths of the files that this process has opened."""


def count_opens(event: str, arguments: tuple) -> None:
    if event == "open" and isinstance(arguments[0], str):
        counting.append(arguments[0])


if __name__ == "__main__":
    sys.addaudithook(count_opens)
    main()
