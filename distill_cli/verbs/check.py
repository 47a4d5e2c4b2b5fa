"""Check loss, engines, sync and checkpoint on the real models, in two minutes.

Is the loss zero where teacher and student are the same model, and not zero otherwise? Do sampler, scorer and trainer
agree on log-probabilities? Is the loss the mean over all tokens, and the gradient its slope? Do a step, a sync and a
checkpoint do what they should? Each answer is a number against a limit, with a fix if it is not met (status 1).

examples
  distill check
  distill check model=qwen3_1.7b_4b data.train.path=train.jsonl data.validation.path=test.jsonl
  distill check cluster.ranks_per_node=2 mesh.context=2
"""

from distill_cli.config.flags import add_hydra_flags
from distill_cli.verbs.command_line import Arguments, Parser


def declare(parser: Parser) -> None:
    parser.add_overrides()
    add_hydra_flags(parser)


def main(arguments: Arguments) -> int:
    """Start the ranks on a few short answers; return 0 if every finding is good, else 1.

    Raises:
        ConfigError: the config is wrong, or describes several jobs or one for a cluster.
        DistillError: the ranks failed.
    """
    from distill_cli.jobs.scratch_runs import self_check

    return self_check(arguments.overrides, arguments.flags)
