"""`distill [VERB] [OVERRIDES]`: verbs, and errors in one line each.

Exit status: 0 done; 1 a failure while running; 2 the input is wrong; 130 and 143 stopped by Ctrl-C and SIGTERM;
141 whoever read the output has left.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from distill_cli.errors import ConfigError, DistillError, Stopped
from distill_cli.verbs import completion, help

HYDRA_ANSWERS = {"--cfg", "-c", "--info", "-i", "--hydra-help", "--shell-completion", "-sc"}
"""Flags that Hydra answers, and nothing else happens."""


def main() -> None:
    """The console script."""
    if hydra_answers(sys.argv[1:]):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Hydra logs them, and logging would tell of a reader who left
    try:
        status = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # who read it has left, as `head` does
        from distill_cli.terminal.console import READER_GONE, discard

        discard()
        status = READER_GONE
    sys.exit(status)


def hydra_answers(argv: Sequence[str]) -> bool:
    return any(word.split("=")[0] in HYDRA_ANSWERS for word in argv)


def run(argv: Sequence[str]) -> int:
    """Runs one command line; its exit status."""
    if completion.is_asked(argv, os.environ) and not completion.complete(list(VERBS)):
        return 0
    verb, rest = split_verb(argv)
    if "--help" in rest or "-h" in rest:
        print(help.VERBS[verb] if argv[0] == verb else help.GENERAL, end="")
        return 0
    if "--version" in rest:
        from importlib import metadata

        print(f"distill {metadata.version('distill-cli')}")
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
    except Stopped as stopped:
        print(f"stopped by {stopped}; no process was left behind", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        return 130


def split_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb and what follows; `train` where none is given.

    Raises:
        SystemExit: the first word is neither a verb nor an override (status 2, with the verbs).
    """
    if not argv or argv[0].startswith(("-", "+", "~")) or "=" in argv[0]:
        return "train", list(argv)
    if argv[0] not in VERBS:
        from distill_cli.config.choices import nearest

        print(
            f"error: {argv[0]}: no such verb{nearest(argv[0], VERBS)} (there are: {', '.join(VERBS)}; "
            "an override is key=value)",
            file=sys.stderr,
        )
        raise SystemExit(2)
    return argv[0], list(argv[1:])


def train(argv: Sequence[str]) -> int:
    typed = wait_as_override(argv)
    if hydra_answers(argv):
        from distill_cli.config.compose import compose  # without what only a run needs

        compose(typed)
        return 0
    from distill_cli.verbs.train import train

    return train(typed, command=["distill", *argv])


def wait_as_override(argv: Sequence[str]) -> list[str]:
    """`--wait` is cluster.wait=true."""
    return ["cluster.wait=true" if word == "--wait" else word for word in argv]


def plan(argv: Sequence[str]) -> int:
    from distill_cli.verbs.plan import plan

    return plan(wait_as_override(argv))


def check(argv: Sequence[str]) -> int:
    from distill_cli.verbs.check import check

    return check(argv)


def resume(argv: Sequence[str]) -> int:
    from distill_cli.verbs.resume import resume

    return resume(wait_as_override(argv))


def replay(argv: Sequence[str]) -> int:
    from distill_cli.verbs.replay import replay

    return replay(wait_as_override(argv))


def export(argv: Sequence[str]) -> int:
    from distill_cli.verbs.export import export

    return export(argv)


def evaluate(argv: Sequence[str]) -> int:
    from distill_cli.verbs.eval import run_eval

    return run_eval(argv)


def report(argv: Sequence[str]) -> int:
    from pathlib import Path

    from distill_cli.report.comparison import print_comparison
    from distill_cli.report.html import report_file, write_report
    from distill_cli.report.read import read_results
    from distill_cli.terminal.console import Console

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
    from distill_cli.track.run_tracking import track

    return track(argv)


def ls(argv: Sequence[str]) -> int:
    from distill_cli.config.choices import conf_dir
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
    "replay": replay,
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
