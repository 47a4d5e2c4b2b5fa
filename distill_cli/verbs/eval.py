"""Measure accuracy on a benchmark through vLLM, with intervals; --against compares models.

Pass@1, pass@k, majority@k, length and truncated rate, with bootstrap 95% intervals over the problems; against other
models also the paired difference and its p-value. The answers are kept as parquet.

examples
  distill eval runs/latest
  distill eval runs/latest --against before teacher
  distill eval runs/latest eval.repeat=4 eval.temperature=1.0 eval.max_samples=500
"""

from distill_cli.errors import ConfigError
from distill_cli.verbs.command_line import Arguments, Parser, complete_with, is_override


def declare(parser: Parser) -> None:
    parser.add_subject("RUN|MODEL", help="a run's folder such as runs/latest, a model's folder, or its name on the hub")
    against = parser.add_argument(
        "--against", nargs="+", action="extend", default=[], metavar="RUN|MODEL",
        help="further models; `before` and `teacher` are the run's own student before training, and its teacher",
    )  # fmt: skip
    complete_with(against, ("before", "teacher"))
    parser.add_step("best", "last", help="which checkpoint: a step, the best by checkpoint.metric, or the last")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def main(arguments: Arguments) -> int:
    """Evaluate one model after the other; return the exit status.

    Raises:
        ConfigError: no such run or model, an override is refused, or the benchmark cannot be read.
        DistillError: a model could not be evaluated.
    """
    from distill_cli.jobs.evaluation import evaluate

    against = [word for word in arguments.against if not is_override(word)]
    if arguments.against and not against:
        raise ConfigError(f"--against {arguments.against[0]}: is an override; give a run, a model, before or teacher")
    overrides = [*arguments.overrides, *filter(is_override, arguments.against)]
    settings = {"step": arguments.step, "as_json": arguments.json, "command": arguments.command}
    return evaluate([arguments.subject, *against], overrides, **settings)
