"""Compose and check everything and print what would run, without starting it.

Prints the mesh and who holds what, the arithmetic of a step, memory by part, the command or the job's script, and
what a run would refuse or warn of.

examples
  distill plan
  distill plan --measure
  distill plan model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill plan cluster.ranks_per_node=2 mesh.tensor=2
"""

from distill_cli.config.flags import add_hydra_flags
from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_overrides()
    text = "run the first steps here, and print seconds by stage, over an epoch and the run; leaves nothing behind"
    parser.add_argument("--measure", action="store_true", help=text)
    parser.add_wait()
    add_hydra_flags(parser)


def main(arguments: Arguments) -> int:
    """Check and print each job; with `--measure` also run the first steps of the only one."""
    from distill_cli.jobs.plan_tables import plan

    return plan(arguments.overrides, arguments.flags, measures=arguments.measure)
