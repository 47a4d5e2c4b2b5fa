"""Try on equal terms what papers disagree about; docs/findings.md has what came out.

    python scripts/findings.py                       # the cases, each with its command
    python scripts/findings.py supports tails        # run some: one sweep each, over three seeds
    python scripts/findings.py all --pair PAIR       # on another pair: a folder with student/ and teacher/
    python scripts/findings.py supports --write docs/findings.md

A case is one `distill -m` command, printed before it runs; its table has means and 95% intervals over the seeds. With
`--write` the table replaces the one between the case's markers in a document.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distill_cli.folders.run_dir import RunDir
from distill_cli.metrics import find
from distill_cli.report.pools import Pool, mean_of, pools
from distill_cli.report.read import RunResult, last_values, read_results

SEEDS = "train.seed=1,2,3"
COLUMNS = ("val/accuracy", "train/kl_forward", "train/kl_reverse", "train/entropy", "train/student_topk_mass")
HEADS = {"train/student_topk_mass": "mass on the support"}
TINY = ("train.max_steps=60",)
REAL = (
    *("data=chat", "train.max_steps=40", "rollout.prompts_per_step=16", "train.global_batch_size=16", "train.lr=1e-4"),
    *("rollout.max_new_tokens=48", "rollout.max_sequence_length=192", "data.validation=null", "eval.record_samples=0"),
)
QUIET = ("eval.at_start=false", "eval.period=0", "eval.teacher=false", "tracker=none", "checkpoint.enabled=false")


@dataclass(frozen=True)
class Case:
    question: str
    argv: tuple[str, ...]
    pass_at: int = 0
    """Also evaluate every run with this many answers to each problem, sampled at temperature 1."""


CASES = {
    "tails": Case(
        "Renormalise on the top-k, or one more class for the rest?",
        ("loss.tail=bucket,renormalize", "loss.topk=2,8,64"),
    ),
    "temperature": Case("Which temperature of the loss?", ("loss.temperature=0.5,1,2,4",)),
    "kinds": Case(
        "Forward, reverse or mixed: one answer, or the best of eight?", ("loss=forward,reverse,mixed",), pass_at=8
    ),
    "tokens": Case("The first tokens, the last, or all?", ("loss.token_weight=null,first_fraction,last_fraction",)),
    "supports": Case(
        "Whose tokens are compared?", ("loss=mixed,reverse", "loss.support=teacher,student,full", "loss.topk=4")
    ),
    "control": Case("What does the teacher bring?", ("loss=mixed,policy_gradient,no_teacher",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)}, or all")
    parser.add_argument("--pair", type=Path, help="a folder with student/ and teacher/; the embedded pair without it")
    parser.add_argument("--steps", type=int, help="training steps of every run")
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
    settings = TINY
    if arguments.pair is not None:
        paths = (f"model.{role}.path={arguments.pair / role}" for role in ("student", "teacher"))
        settings = ("model=custom", *paths, *REAL)
    steps = [] if arguments.steps is None else [f"train.max_steps={arguments.steps}"]
    return [*program, "-m", *settings, *QUIET, *case.argv, SEEDS, *steps]


def run(case: Case, arguments: argparse.Namespace) -> str:
    """Run a case's sweep in a temporary folder and return its table in Markdown."""
    argv = command(case, arguments, sys.executable, "-m", "distill_cli")
    print("$", shlex.join(["distill", *argv[3:]]), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(argv, cwd=folder, check=True, stdout=sys.stderr)
        (sweep,) = (Path(folder) / "runs").glob("*_sweep*")
        results = read_results([sweep])
        passed = {result.folder: pass_at(result, case.pass_at) for result in results} if case.pass_at else {}
        return markdown(pools(results), passed, number=case.pass_at)


def pass_at(result: RunResult, number: int) -> dict[str, float]:
    """Return the share of problems of which one of `number` answers is right, and the mean accuracy."""
    options = (f"eval.repeat={number}", "eval.temperature=1", "eval.max_samples=128")
    argv = [sys.executable, "-m", "distill_cli", "eval", str(result.folder), *options]
    subprocess.run(argv, check=True, stdout=sys.stderr)
    file = max(RunDir(result.folder).path.glob("evals/**/*.json"), key=lambda one: one.stat().st_mtime)
    content = json.loads(file.read_text())
    return {name: content[name] for name in ("accuracy", f"pass@{number}") if name in content}


def markdown(among: Sequence[Pool], passed: dict[Path, dict[str, float]], *, number: int) -> str:
    """Return a row for each pool: the metrics' last values, and what `pass_at` measured."""
    metrics = [metric for name in COLUMNS if (metric := find(name))]
    head = ["", *(HEADS.get(metric.name, metric.label) for metric in metrics)]
    head += ["pass@1", f"pass@{number}"] if passed else []
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for pool in among:
        found = [last_values(RunDir(result.folder).metrics, COLUMNS) for result in pool.counted]
        cells = []
        for metric in metrics:
            values = [one[metric.name] for one in found if metric.name in one]
            cells.append(mean_of(values).shown(metric) if values else "")
        for key in ("accuracy", f"pass@{number}") if passed else ():
            mean = mean_of([passed[result.folder][key] for result in pool.counted])
            cells.append(f"{mean.value:.1%}" + ("" if mean.half is None else f" ± {mean.half:.1%}"))
        lines.append(
            f"| `{' '.join(f'{key}={value}' for key, value in pool.settings.items())}` | {' | '.join(cells)} |"
        )
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
