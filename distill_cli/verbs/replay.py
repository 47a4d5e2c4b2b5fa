"""Train again on what a run recorded (rollout.save_scores), without engines.

The run's config is the base. Its recorded sequences, with the teacher's top-k, take the place of prompts, answers and
the teacher, step by step: only a student is trained, as a run of its own, on any number of ranks. Loss, optimizer,
student and mesh may differ from the recorded run's; what shaped the recording may not, and loss.topk may not grow.
Nothing is validated unless eval.period, eval.at_start or eval.at_end ask for it: that starts the student's engine.

With -m every combination of the values is a replay of the same run, in one sweep's folder; a table compares them. Seeds
are pooled: train.seed=1,2,3 gives means with intervals. Each seed reads the recorded steps in an order of its own.

examples
  distill replay runs/latest loss=reverse
  distill replay runs/latest loss.topk=16 train.lr=5e-4
  distill replay runs/latest eval.at_end=true
  distill replay -m runs/latest loss=forward,reverse train.seed=1,2,3
"""

from pathlib import Path

from distill_cli.config.flags import MULTIRUN
from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_subject("RUN", help="folder of a run that kept its scores, such as runs/latest")
    parser.add_argument("-m", "--multirun", action="store_true", help=MULTIRUN)
    parser.add_wait()


def main(arguments: Arguments) -> int:
    """Train on a recorded run, once or as a sweep; return the exit status.

    Raises:
        ConfigError: no such run, or one without scores; an override does not fit what was recorded.
        DistillError: the only replay failed.
    """
    from distill_cli.folders.run_dir import open_run
    from distill_cli.jobs.run_jobs import replay_jobs, run_jobs

    jobs = replay_jobs(open_run(Path(arguments.subject)), arguments.overrides, is_sweep=arguments.multirun)
    return run_jobs(jobs, command=arguments.command)
