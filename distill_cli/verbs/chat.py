"""Talk with what was trained, through vLLM: side by side with another model, with the KL of each token.

A conversation, with the run's chat template, system prompt and sampling. /help lists what else a line may say: /kl
shows the last answer by its KL from the teacher, which is loaded then. With --against two models answer each message,
and each reads its own answers. If standard input is no terminal, each of its lines is a question of its own.

examples
  distill chat runs/latest
  distill chat runs/latest --against before --kl
  distill chat runs/latest --against runs/other --temperature 0
"""

from distill_cli.verbs.command_line import Arguments, Parser, complete_with, given


def declare(parser: Parser) -> None:
    parser.add_subject("RUN|MODEL", help="a run's folder, a model's, or its name on the hub")
    against = parser.add_argument(
        "--against", type=given, metavar="RUN|MODEL",
        help="a second model; `before` and `teacher` are the run's own",
    )  # fmt: skip
    complete_with(against, ("before", "teacher"))
    parser.add_step("best", "last", help="which checkpoint: a step, the best by checkpoint.metric, or the last")
    parser.add_argument("--kl", action="store_true", help="show the KL of each answer's tokens from the teacher")
    parser.add_argument("--teacher", type=given, metavar="NAME", help="the teacher of the KL, of several")
    parser.add_argument("--temperature", type=given, metavar="T", help="of sampling; 0 is greedy (the run's)")
    parser.add_argument("--max-new-tokens", type=given, metavar="N", help="most tokens of an answer (the run's)")
    parser.add_argument("--seed", type=given, metavar="N", help="of sampling (the run's)")
    parser.add_argument("--json", action="store_true", help="a JSON object for each line of standard input")


def main(arguments: Arguments) -> int:
    """Talk until the input ends or the user leaves; return the exit status, 1 if a line of input was not answered.

    Raises:
        ConfigError: no such run or model, an override is refused, or the models do not fit.
        DistillError: an engine could not be started, or is gone.
    """
    from distill_cli.chat.main import chat

    flags = {
        "rollout.temperature": arguments.temperature,
        "rollout.max_new_tokens": arguments.max_new_tokens,
        "train.seed": arguments.seed,
    }
    typed = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return chat(
        arguments.subject,
        [*arguments.overrides, *typed],
        against=arguments.against,
        step=arguments.step,
        teacher=arguments.teacher,
        shows_kl=arguments.kl,
        as_json=arguments.json,
    )
