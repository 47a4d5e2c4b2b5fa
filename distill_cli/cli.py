"""`distill [VERB] [OVERRIDES]`: verbs, and errors in one line each.

Exit status: 0 done; 1 a failure while running; 2 the input is wrong; 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from distill_cli.errors import ConfigError, DistillError
from distill_cli.verbs import help


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
    """Runs one command line; its exit status."""
    verb, rest = split_verb(argv)
    if "--help" in rest or "-h" in rest:
        print(help.VERBS[verb] if argv[0] == verb else help.GENERAL, end="")
        return 0
    try:
        return VERBS[verb](rest)
    except ConfigError as error:
        if os.environ.get("DISTILL_DEBUG"):
            raise
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except DistillError as error:
        if os.environ.get("DISTILL_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or os.environ.get("DISTILL_DEBUG"):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"error: the disk is full{where}; free some: `distill resume RUN` goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and what follows; `train` where none is given.

    Raises:
        SystemExit: the first word is neither a verb nor an override (status 2, with the verbs).
    """
    strip_verb_from_completion()
    if not argv or argv[0].startswith(("-", "+", "~")) or "=" in argv[0]:
        return "train", list(argv)
    if argv[0] not in VERBS:
        from distill_cli.config.overrides import nearest

        print(
            f"error: {argv[0]}: no such verb{nearest(argv[0], VERBS)} (there are: {', '.join(VERBS)}; "
            "an override is key=value)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return argv[0], list(argv[1:])


def strip_verb_from_completion() -> None:
    """Hydra's completion reads the command line from COMP_LINE and knows no verbs."""
    line = os.environ.get("COMP_LINE")
    if line is None:
        return
    words = line.split(" ")
    if len(words) > 2 and words[1] in VERBS:
        removed = len(words.pop(1)) + 1
        os.environ["COMP_LINE"] = " ".join(words)
        if "COMP_POINT" in os.environ:
            os.environ["COMP_POINT"] = str(max(0, int(os.environ["COMP_POINT"]) - removed))


def train(argv: Sequence[str]) -> int:
    from distill_cli.verbs.train import train

    return train(wait_as_override(argv), command=["distill", *argv])


def wait_as_override(argv: Sequence[str]) -> list[str]:
    """`--wait` is cluster.wait=true."""
    return ["cluster.wait=true" if word == "--wait" else word for word in argv]


def plan(argv: Sequence[str]) -> int:
    from distill_cli.config.compose import compose
    from distill_cli.config.schema import Launcher
    from distill_cli.jobs.run import check_jobs
    from distill_cli.verbs.plan import print_plan, print_script

    jobs = compose(wait_as_override(argv))
    for job, found in zip(jobs, check_jobs(jobs), strict=True):
        print_plan(job, found)
    if jobs and jobs[0].config.cluster.launcher is Launcher.slurm:
        print_script(jobs)
    return 0


def check(argv: Sequence[str]) -> int:
    from distill_cli.verbs.check import check

    return check(argv)


def resume(argv: Sequence[str]) -> int:
    from distill_cli.verbs.resume import resume

    return resume(wait_as_override(argv))


def export(argv: Sequence[str]) -> int:
    from distill_cli.verbs.export import export

    return export(argv)


def evaluate(argv: Sequence[str]) -> int:
    from distill_cli.verbs.eval import run_eval

    return run_eval(argv)


def report(argv: Sequence[str]) -> int:
    from pathlib import Path

    from rich.console import Console

    from distill_cli.report.html import report_file, write_report
    from distill_cli.report.read import read_results
    from distill_cli.report.table import print_comparison

    paths, out = [Path(word) for word in argv], None
    if "--out" in argv:
        at = argv.index("--out")
        if at + 1 == len(argv):
            raise ConfigError("distill report: --out takes the file that is to be written")
        out, paths = Path(argv[at + 1]), paths[:at] + paths[at + 2 :]
    if not paths or any(str(path).startswith("-") for path in paths):
        raise ConfigError("distill report: give the folders of runs or of a sweep, such as runs/latest [--out FILE]")
    results = read_results(paths)
    print_comparison(Console(highlight=False), results)
    print(f"report   {write_report(results, out or report_file(paths))}")
    return 0


def watch(argv: Sequence[str]) -> int:
    from distill_cli.verbs.watch import watch

    return watch(argv)


def track(argv: Sequence[str]) -> int:
    from distill_cli.jobs.tracking import track

    return track(argv)


def ls(argv: Sequence[str]) -> int:
    from distill_cli.config.compose import conf_dir
    from distill_cli.verbs.ls import print_choices

    if len(argv) > 1:
        raise ConfigError(f"{' '.join(argv)}: `distill ls` takes one group")
    print_choices(conf_dir(), argv[0] if argv else None)
    return 0


def doctor(argv: Sequence[str]) -> int:
    from distill_cli.verbs.doctor import run_doctor

    if any(argument != "--json" for argument in argv):
        raise ConfigError(f"{' '.join(argv)}: `distill doctor` takes --json alone")
    return run_doctor(as_json="--json" in argv)


VERBS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "plan": plan,
    "check": check,
    "resume": resume,
    "eval": evaluate,
    "export": export,
    "report": report,
    "watch": watch,
    "track": track,
    "ls": ls,
    "doctor": doctor,
}


if __name__ == "__main__":
    main()
