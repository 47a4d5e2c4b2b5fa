"""Measure time and size of the report of a run with 1,000 steps and 200 recorded answers, on generated data.

python scripts/bench_report.py [TOKENS]      # per answer; default 300
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from distill_cli.report.html import write_report
from distill_cli.report.read import read_results
from tests.report.made import make_run


def main() -> None:
    num_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    with tempfile.TemporaryDirectory() as folder:
        recorded = range(0, 1000, 100)
        run = make_run(
            Path(folder) / "run", num_steps=1000, num_prompts=20, num_tokens=num_tokens, recorded=recorded, slowness=200
        )
        begin, cpu = time.perf_counter(), time.process_time()
        file = write_report(read_results([run.path]), Path(folder) / "report.html")
        seconds, cpu_s, size = time.perf_counter() - begin, time.process_time() - cpu, file.stat().st_size
        what = f"1,000 steps, 200 answers of {num_tokens} tokens"
        print(f"{what}: {seconds:.1f} s ({cpu_s:.1f} s CPU time), {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
