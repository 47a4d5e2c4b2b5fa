"""Train a student on its own answers, scored by a teacher (the default verb).

The whole configuration is checked first: everything wrong with it is reported at once (status 2), before anything
starts. Then the run's folder is written, the ranks start, and each step prints a line.

examples
  distill                                              the embedded pair, on this machine's CPU
  distill experiment=quick                             ten steps of it
  distill loss=reverse loss.topk=32 train.lr=1e-3      a choice of a group, and keys
  distill -m loss.topk=32,64 loss.kl_weight=0.3,0.5    a sweep of four runs; search.trials=20 draws runs instead
  distill cluster=slurm cluster.slurm.partition=gpu    the same as a job
"""

from distill_cli.config.flags import add_hydra_flags
from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_overrides()
    parser.add_wait()
    parser.add_argument("--version", action="store_true", help="print distill's version")
    add_hydra_flags(parser)


def main(arguments: Arguments) -> int:
    """Train to the end, or submit the job; return the exit status.

    Raises:
        ConfigError: some job is wrong; nothing was started.
        DistillError: the only job failed.
    """
    overrides, flags, command = arguments.overrides, arguments.flags, arguments.command
    if arguments.version:
        from importlib.metadata import version

        print(f"distill {version('distill-cli')}")
        return 0
    if any(word.lstrip("+").startswith("search.trials=") and not word.endswith("=null") for word in overrides):
        from distill_cli.jobs.run_jobs import new_console
        from distill_cli.jobs.search import search

        return search(overrides, flags, command=command, console=new_console())
    from distill_cli.config.compose import compose

    jobs = compose(overrides, flags)
    if not jobs:  # Hydra answered one of its flags
        return 0
    from distill_cli.jobs.run_jobs import run_jobs

    return run_jobs(jobs, command=command)
