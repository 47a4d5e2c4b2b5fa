"""Sweeps of a hundred to a thousand runs on a real Slurm, each a task that does nothing: what each part costs.

`scripts/slurm_cluster.sh run python scripts/bench_slurm.py` prints one line a size. Folders are made and submitted as
those of a sweep are, states are asked as `--wait` asks, and every run's end is read once. Composing is Hydra's and is
measured apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from distill_cli.config.compose import compose
from distill_cli.jobs.submit import how_it_ended, note_job
from distill_cli.launch import slurm
from distill_cli.launch.slurm import settle
from distill_cli.rundir import Element, RunDir, SweepDir, create, write_json


@dataclass(frozen=True)
class Nothing:
    """A task that ends as a run does, without having done anything."""

    run: str

    def __call__(self) -> None:
        import submitit

        end = {"job_id": submitit.JobEnvironment().job_id, "status": 0, "error": None}
        write_json(RunDir(Path(self.run)).slurm_end, end)
        write_json(RunDir(Path(self.run)).outcome, {"state": "finished"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[100, 300, 1000])
    parser.add_argument("--run-to-the-end", type=int, default=0, help="let this many of the smallest sweep run")
    arguments = parser.parse_args()
    config = compose(["cluster=slurm", "cluster.cpus_per_node=1"])[0].config
    settle(config)
    begin = time.perf_counter()
    jobs = compose(["-m", f"train.seed={','.join(map(str, range(20)))}"])
    print(f"compose          {(time.perf_counter() - begin) / len(jobs) * 1000:7.1f} ms a run")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            measure(config, Path(folder), size, hold=size != arguments.run_to_the_end)


def measure(config, folder: Path, size: int, *, hold: bool) -> None:
    config.cluster.extra = {"hold": True} if hold else {}
    sweep, begin = SweepDir(folder / "sweep"), time.perf_counter()
    elements = [Element(index, f"{index}_seed={index}", [f"train.seed={index}"]) for index in range(size)]
    runs = [create(sweep.path / element.folder, command=["distill"]) for element in elements]
    sweep.write(command=["distill"], elements=elements)
    made = time.perf_counter()
    job_ids = slurm.submit(config, sweep.path / "slurm", [Nothing(str(run.path)) for run in runs], name="bench")
    for run, job_id in zip(runs, job_ids, strict=True):
        note_job(run, job_id, sweep.path / "slurm")
    submitted = time.perf_counter()
    states = slurm.active(*job_ids)
    asked = time.perf_counter()
    assert len(states) == size or not hold
    if hold:
        slurm.ask("scancel", job_ids[0].partition("_")[0])
    else:
        while slurm.active(*job_ids):
            time.sleep(1.0)
    ran, statuses = time.perf_counter(), []
    if not hold:
        statuses = [how_it_ended(run, job_id)[0] for run, job_id in zip(runs, job_ids, strict=True)]
        assert not any(statuses)
    read = time.perf_counter()
    print(
        f"{size:5d} runs: folders {made - begin:6.2f} s, submit {submitted - made:6.2f} s, one look at all states "
        f"{asked - submitted:6.3f} s"
        + ("" if hold else f", to the end {ran - asked:6.1f} s, read {read - ran:6.2f} s"),
        flush=True,
    )


if __name__ == "__main__":
    main()
