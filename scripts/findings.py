"""Try on equal terms what papers disagree about; docs/findings.md has what came out.

    python scripts/findings.py                       # the cases, each with its command
    python scripts/findings.py supports tails        # run some: one sweep each, over three seeds
    python scripts/findings.py all --pair PAIR       # on another pair, made by scripts/make_findings_pair.py
    python scripts/findings.py supports --write docs/findings.md

A case is one `distill -m` command, printed before it runs. Its table has means and 95% intervals over the
seeds of what scripts/findings_measure.py measures. With `--write` the table replaces the one between the case's
markers in a document.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from findings_measure import measure
from make_findings_pair import SIZES

from distill_cli.folders.run_dir import RunDir
from distill_cli.metrics import METRICS
from distill_cli.report.pools import Pool, mean_of, pools
from distill_cli.report.read import last_values, read_results

SEEDS = "train.seed=1,2,3"
COLUMNS = {
    "pass@1": ("pass@1", "val/accuracy"),
    "pass@k": ("pass@{}", "val/accuracy"),
    "truncated": ("cut off", "val/truncated_rate"),
    "kl_forward": ("KL forward", "train/kl_forward"),
    "kl_reverse": ("KL reverse", "train/kl_reverse"),
    "entropy": ("entropy", "train/entropy"),
    "train/student_topk_mass": ("mass on the support", "train/student_topk_mass"),
}
"""What is measured -> its title, and a metric that is written in the same way."""
OF_NAME = {metric.name: metric for metric in METRICS}
TINY = ("train.max_steps=20",)
REAL = ("rollout.prompts_per_step=8", "train.global_batch_size=8", "train.max_steps=12", "train.lr=5e-4")
QUIET = (
    *("eval.at_start=false", "eval.at_end=false", "eval.period=0", "eval.teacher=false", "eval.record_samples=0"),
    *("tracker=none", "checkpoint.enabled=false"),
)


@dataclass(frozen=True)
class Case:
    question: str
    argv: tuple[str, ...]


CASES = {
    "tails": Case(
        "Renormalise on the top-k, or one more class for the rest?",
        ("loss.tail=bucket,renormalize", "loss.topk=2,8,64"),
    ),
    "temperature": Case("Which temperature of the loss?", ("loss.temperature=0.5,1,2,4",)),
    "kinds": Case("Forward, reverse or mixed: one answer, or the best of eight?", ("loss=forward,reverse,mixed",)),
    "tokens": Case("The first tokens, the last, or all?", ("loss.token_weight=null,first_fraction,last_fraction",)),
    "supports": Case(
        "Whose tokens are compared?", ("loss=mixed,reverse", "loss.support=teacher,student,full", "loss.topk=4")
    ),
    "control": Case("What does the teacher bring?", ("loss=mixed,policy_gradient,no_teacher",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}, or all")
    parser.add_argument(
        "--pair",
        type=lambda text: Path(text).resolve(),
        help="a folder with student/ and teacher/; the embedded pair without it",
    )
    parser.add_argument("--steps", type=int, help="training steps of every run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUES", help="replace settings of the cases")
    parser.add_argument("--problems", type=int, default=64, help="held-out problems of a measurement")
    parser.add_argument("--answers", type=int, default=8, help="answers to each of them")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--write", type=Path, help="a document whose tables are replaced")
    arguments = parser.parse_args()
    if unknown := {*arguments.cases} - {*CASES, "all"}:
        parser.error(f"no such case: {', '.join(unknown)}")
    if not arguments.cases:
        for name, case in CASES.items():
            print(f"{name:<12}{case.question}\n{'':<12}{shlex.join(command(case, arguments, 'distill'))}")
        return
    for name in CASES if "all" in arguments.cases else arguments.cases:
        table = run(CASES[name], arguments)
        print(f"{name}: {CASES[name].question}\n\n{table}\n", flush=True)
        if arguments.write:
            write(arguments.write, name if arguments.pair is None else f"{name} {arguments.pair.name}", table)


def command(case: Case, arguments: argparse.Namespace, *program: str) -> list[str]:
    settings: tuple[str, ...] = TINY
    if (pair := arguments.pair) is not None:
        paths = {f"model.{role}": f"{pair / role}" for role in ("student", "teacher")}
        paths |= {"data.train": f"{pair / 'train.jsonl'}", "data.validation": f"{pair / 'held_out.jsonl'}"}
        located = (f"{key}.path={path}" for key, path in paths.items())
        settings = ("model=custom", "data=jsonl", "data.verifier=regex", *located, *SIZES, *REAL)
    steps = [] if arguments.steps is None else [f"train.max_steps={arguments.steps}"]
    changed = {one.partition("=")[0] for one in arguments.set}
    own = [one for one in case.argv if one.partition("=")[0] not in changed]
    jobs = [] if arguments.jobs == 1 else [f"cluster.parallel_jobs={arguments.jobs}"]
    return [*program, "-m", *settings, *QUIET, *own, *arguments.set, SEEDS, *steps, *jobs]


def run(case: Case, arguments: argparse.Namespace) -> str:
    """Run a case's sweep in a temporary folder and return its table in Markdown."""
    argv = command(case, arguments, sys.executable, "-m", "distill_cli")
    print("$", shlex.join(["distill", *argv[3:]]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(argv, cwd=folder, check=True, stdout=sys.stderr)
        (sweep,) = (Path(folder) / "runs").glob("*_sweep*")
        return table(pools(read_results([sweep])), num_problems=arguments.problems, num_answers=arguments.answers)


def table(among: Sequence[Pool], *, num_problems: int, num_answers: int) -> str:
    """Measure the runs, and return a line for each pool: means over its seeds with their intervals."""
    columns = {name: column for name, column in COLUMNS.items() if name != "pass@k" or num_answers > 1}
    titles = " | ".join(title.format(num_answers) for title, _ in columns.values())
    lines = [f"|  | {titles} |", "|" + "---|" * (len(columns) + 1)]
    for pool in among:
        seeds = [
            measure(one.folder, num_problems=num_problems, num_answers=num_answers)
            | last_values(RunDir(one.folder).metrics, columns)
            for one in pool.counted
        ]
        means = {name: mean_of([one[name] for one in seeds]) for name in columns}
        cells = [means[name].shown(OF_NAME[metric]) for name, (_, metric) in columns.items()]
        settings = " ".join(f"{key}={value}" for key, value in pool.settings.items())
        lines.append(f"| `{settings}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def write(document: Path, name: str, table: str) -> None:
    """Replace what stands between the markers of a case."""
    text, pattern = document.read_text(), rf"(<!-- {re.escape(name)} -->\n).*?(\n<!-- end -->)"
    found, number = re.subn(pattern, lambda match: match[1] + table + match[2], text, flags=re.DOTALL)
    if number != 1:
        sys.exit(f"error: {document}: has no markers <!-- {name} --> and <!-- end -->")
    document.write_text(found)


if __name__ == "__main__":
    main()
