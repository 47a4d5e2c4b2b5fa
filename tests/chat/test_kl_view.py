"""How the KL of an answer is shown: two columns and colours, and what is left without them."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from distill_cli.chat import kl_view
from distill_cli.chat.screen import wrapped
from distill_cli.config.loss_schema import Alignment, LossConfig, Support
from distill_cli.types import TokenViews

TEXTS = ["1", "\n", "\x1b[31m"]


def answer(kls: list[float | None]) -> SimpleNamespace:
    """An answer of TEXTS, whose likeliest tokens are 7 and 8 of the student, 9 of the teacher."""
    known = [kl is not None for kl in kls]
    views = TokenViews(
        *[kls] * 6,
        student_top_ids=[[7, 8] if one else [] for one in known],
        student_top_logp=[[math.log(0.75), math.log(0.25)] if one else [] for one in known],
        teacher_top_ids=[[9, 10] if one else [] for one in known],
        teacher_top_logp=[[math.log(0.99999), math.log(1e-5)] if one else [] for one in known],
    )
    return SimpleNamespace(texts=TEXTS, views=views, likeliest=lambda token: f"t{token}")


def printed(*parts: object, colour: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=100, force_terminal=colour, color_system="truecolor" if colour else None)
    for part in parts:
        console.print(part)
    return stream.getvalue()


def test_tokens_are_coloured_up_to_the_scale() -> None:
    found = answer([0.0, 0.5, 2.0])
    scale = kl_view.colour_scale([found, answer([None, None, 0.2])])
    assert scale == 0.5  # the 99th percentile of three is the second highest
    assert kl_view.colour_scale([answer([None] * 3)]) == kl_view.LEAST_SCALE
    assert kl_view.heat(0.0, scale).bgcolor is kl_view.heat(None, scale).bgcolor is None
    assert kl_view.heat(0.5, scale) == kl_view.heat(math.inf, scale) == kl_view.heat(9.0, scale)
    text = kl_view.coloured(found, scale)
    assert text.plain == "1↵\n␛[31m"
    assert [text.plain[span.start : span.end] for span in text.spans if span.style.bgcolor] == ["↵", "␛[31m"]


def test_without_colours_the_highest_are_listed() -> None:
    shown = printed(kl_view.highest(answer([None, 0.5, 2.0])), colour=False)
    header, *rows = [line.split() for line in shown.splitlines()]
    assert header == ["at", "token", "KL", "student", "teacher"]
    likeliest = ["'t7'", "75.00%,", "'t8'", "25.00%", "'t9'", "100.00%"]
    assert rows == [["2", "'␛[31m'", "2", *likeliest], ["1", "'\\n'", "0.5", *likeliest]]
    assert "\x1b" not in shown


def test_means_leave_out_unknown_tokens() -> None:
    assert kl_view.summary(answer([None, 0.5, 2.0]).views) == (
        "means of 2 tokens: KL 1.25, reverse KL 1.25, loss 1.25; 1 tokens are left out"
    )
    assert kl_view.summary(answer([None] * 3).views) == "no token of the answer can be compared"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (LossConfig(), "the teacher's top-64 and the rest as one more class"),
        (LossConfig(support=Support.union, topk=8), "both models' top-8 and the rest as one more class"),
        (LossConfig(support=Support.full), "the whole vocabulary"),
        (LossConfig(alignment=Alignment.rank), "both models' 64 likeliest tokens by rank, whatever they are,"),
    ],
)
def test_the_classes_are_named(loss: LossConfig, text: str) -> None:
    assert kl_view.classes(loss).startswith(text)


def test_the_loss_is_what_trains() -> None:
    plain = kl_view.described_loss(LossConfig(kl_weight=0.3, temperature=1.5))
    assert plain == "mixed, kl_weight=0.3, support=teacher, tail=bucket, temperature=1.5"
    more = kl_view.described_loss(LossConfig(kl_type="reverse", token_weight="position", token_clip=2.0, reward=1.0))
    assert "token_weight=position, token_clip=2.0; without the part of rewards and penalties" in more


def test_json_has_no_infinite_numbers() -> None:
    pair = SimpleNamespace(
        alone=SimpleNamespace(
            config=SimpleNamespace(
                loss=LossConfig(),
                model=SimpleNamespace(teacher=SimpleNamespace(is_student=False, has_own_tokenizer=False)),
                data=SimpleNamespace(teacher_context=None),
            )
        ),
        resolved=SimpleNamespace(vocabulary=SimpleNamespace(merged_eos_ids=())),
    )
    row = json.loads(json.dumps(kl_view.as_json(answer([None, math.inf, 2.0]), pair), allow_nan=False))
    assert row["kl_forward"] == [None, None, 2.0]
    assert row["student_top"][2] == [["t7", 0.75], ["t8", 0.25]]
    assert row["mean"]["kl_forward"] == 2.0


def test_a_column_shows_the_last_lines() -> None:
    console = Console(width=40)
    text = "one two three four five\nsix \x1b seven"

    def lines(most: int | None) -> list[str]:
        return [line.rstrip() for line in wrapped(text, console, 10, most).plain.split("\n")]

    assert lines(None) == ["one two", "three four", "five", "six ␛", "seven"]
    assert lines(2) == ["six ␛", "seven"]
    assert wrapped("", console, 10, 2).plain == ""
