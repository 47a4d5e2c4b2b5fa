"""What Tab offers, from the same declarations as the parser and the help."""

import pytest

from distill_cli.verbs.command_line import VERBS, complete, offered, parser_of


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_is_offered(verb: str) -> None:
    offers, overrides = offered([verb], "-")
    assert set(offers) == parser_of(verb).flags().keys()
    assert overrides is None


def test_flags_of_train_need_no_verb() -> None:
    assert offered([], "--w") == offered(["train"], "--w") == (["--wait"], None)


@pytest.mark.parametrize(
    ("line", "offers", "overrides"),
    [
        ("|pl", ["plan"], []),
        ("|x", [], []),
        ("plan|pl", [], []),
        ("track|", ["sync"], None),
        ("track sync|", [], None),
        ("track sync|--u", ["--uri"], None),
        ("ls|lo", ["loss", "loss/token_weight"], None),
        ("doctor|", [], None),
        ("watch|ru", [], None),
        ("resume|ru", [], None),
        ("resume runs/x|", [], []),
        ("resume --step 3|ru", [], None),
        ("resume --step|", [], None),
        ("replay runs/s/0_topk=1 a=1|lo", [], ["a=1"]),
        ("replay|--mu", ["--multirun"], None),
        ("replay -m runs/x a=1,2|lo", [], ["a=1,2"]),
        ("eval runs/x --step|", ["best", "last"], None),
        ("eval runs/x --against|t", ["teacher"], None),
        ("eval runs/x --against before|t", ["teacher"], []),
        ("plan -m a=1,2 --cfg|", ["job", "hydra", "all"], None),
        ("--info|p", ["plugins"], []),
        ("-m a=1,2|", [], ["a=1,2"]),
        ("|tracker=[ml", ["tracker=[mlflow"], []),
        ("resume runs/x|tracker=[mlflow,w", ["tracker=[mlflow,wandb"], []),
        ("|tracker=[wandb,mlflow,", [f"tracker=[wandb,mlflow,{name}" for name in ("none", "tensorboard")], []),
        ("|loss=[m", [], []),
    ],
)
def test_what_is_offered(line: str, offers: list[str], overrides: list[str] | None) -> None:
    before, _, word = line.partition("|")
    assert offered(before.split(), word) == (offers, overrides)


def test_hydra_sees_overrides_alone(capsys: pytest.CaptureFixture[str]) -> None:
    env = {"COMP_LINE": "distill resume runs/x --step 3 a=1 lo and more", "COMP_POINT": "37"}
    assert complete(env)
    assert env == {"COMP_LINE": "distill a=1 lo", "COMP_POINT": "14"}
    assert capsys.readouterr().out == ""


def test_hydra_completes_no_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert not complete({"COMP_LINE": "distill track sync runs/x --u"})
    assert capsys.readouterr().out == "--uri\n"
