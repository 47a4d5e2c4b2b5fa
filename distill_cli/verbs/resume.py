"""Resume a run, or the unfinished runs of a sweep, from the newest checkpoint.

In the same folder, on any number of ranks and any mesh. Keys that have shaped the weights cannot be changed: they are
compared with the checkpoint's own config, and a difference is refused. docs/runs.md lists the keys that can.

examples
  distill resume runs/latest
  distill resume runs/latest train.max_steps=2000      for longer
  distill resume runs/latest mesh.tensor=2             on another mesh
  distill resume runs/latest --step 40
"""

from pathlib import Path

from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser, parser_of


def declare(parser: Parser) -> None:
    parser.add_subject("RUN|SWEEP", help="its folder, such as runs/latest")
    parser.add_step(help="from an earlier checkpoint; later ones are set aside")
    parser.add_wait()


def main(arguments: Arguments) -> int:
    """Resume a run, or a sweep's unfinished runs; return the exit status.

    Raises:
        ConfigError: there is no such run, it is in use, it is finished, or an override is refused.
        DistillError: the run failed again.
    """
    from distill_cli.folders.run_dir import SweepDir, open_run
    from distill_cli.jobs import run_jobs
    from distill_cli.terminal.console import Console

    path, step, overrides = Path(arguments.subject), arguments.step, arguments.overrides
    console, sweep = Console(highlight=False, soft_wrap=True), SweepDir(path.resolve())
    if not sweep.file.is_file():
        return run_jobs.resume_run(open_run(path), step, overrides, console=console)
    if step is not None:
        raise ConfigError(f"--step {step}: goes back in one run; give a run's folder of {path}")
    if not sweep.space():
        return run_jobs.resume_sweep(sweep, overrides, console=console)
    words = sweep.command()[1:]
    typed = parser_of("train").parse(words[1:] if words[0] == "train" else words)
    return run_jobs.resume_search(sweep, typed.overrides, typed.flags, overrides, console=console)
