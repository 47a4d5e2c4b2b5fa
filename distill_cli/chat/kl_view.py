"""How the KL of an answer's tokens is shown: coloured, the highest as a table, and as JSON. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import nlargest
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.style import Style
from rich.table import Table
from rich.text import Text

from distill_cli.chat.setup import Pair
from distill_cli.config.loss_schema import Alignment, LossConfig, Support, compared_tokens
from distill_cli.terminal.printable import printable
from distill_cli.types import TokenViews

if TYPE_CHECKING:
    from distill_cli.chat.token_kl import AnswerKl

NUM_HIGHEST, NUM_LIKELIEST = 5, 3
"""Tokens of the table, and likeliest tokens of each model there."""
LEAST = 1e-4
"""Probability below which only the likeliest token is shown."""
LEAST_SCALE = 0.1
"""Lower bound of the KL that has the fullest colour, in nats: the tokens of one answer may all agree."""
FAINT = 0.1
"""Shares of the colour scale below this have no colour."""


def describe(pair: Pair) -> list[str]:
    """Return what the KL is of, and the loss, a line each."""
    config, vocabulary = pair.alone.config, pair.resolved.vocabulary
    loss, teacher = config.loss, config.model.teacher
    remarks = []
    if teacher.is_student:
        remarks.append("the teacher is the student itself")
    if teacher.has_own_tokenizer:
        remarks.append(f"the teacher reads its own tokens (loss.alignment={loss.alignment.value})")
    if vocabulary.merged_eos_ids:
        remarks.append("all end-of-sequence tokens are one")
    if config.data.teacher_context is not None:
        remarks.append("the teacher reads no context here, as it does in training (data.teacher_context)")
    of = f"KL(teacher || student) in nats over {classes(loss)}, at temperature {loss.temperature:g}"
    return ["; ".join([of, *remarks]), f"loss: {described_loss(loss)}"]


def classes(loss: LossConfig) -> str:
    """Return what the models are compared on."""
    if loss.alignment is Alignment.rank:
        return f"both models' {loss.topk} likeliest tokens by rank, whatever they are, and the rest as one more class"
    tokens = compared_tokens(loss.support.value, loss.topk)
    return tokens if loss.support is Support.full else f"{tokens} and the rest as one more class"


def described_loss(loss: LossConfig) -> str:
    """Return the divergence that the config trains, with what else is in the loss."""
    parameters = {**loss.parameters, **loss.weight_parameters, **loss.kwargs}
    keys: dict[str, Any] = {
        "support": loss.support.value,
        "tail": loss.tail.value,
        "temperature": f"{loss.temperature:g}",
    }
    for name, off in (
        ("token_weight", None),
        ("token_clip", None),
        ("divergence_weight", 1.0),
        ("policy_gradient", 0.0),
    ):
        if getattr(loss, name) != off:
            keys[name] = getattr(loss, name)
    text = ", ".join([loss.kl_type, *(f"{name}={value}" for name, value in (parameters | keys).items())])
    return text + ("; without the part of rewards and penalties" if loss.has_advantages else "")


def coloured(found: AnswerKl, scale: float) -> Text:
    """Return an answer with each token on a ground that is the redder the higher its KL, up to `scale`."""
    shown = Text()
    for text, kl in zip(found.texts, found.views.kl_forward, strict=True):
        first, *rest = printable(text).replace("\n", "↵\n").split("\n")
        shown.append(first, style=heat(kl, scale))
        shown.append("".join(f"\n{one}" for one in rest))
    return shown


def colour_scale(answers: Sequence[AnswerKl]) -> float:
    """Return the KL of the fullest colour: the highest 99th percentile of an answer, as in the report."""
    known = [sorted(finite(one.views.kl_forward)) for one in answers]
    return max([LEAST_SCALE, *(kls[int(0.99 * (len(kls) - 1))] for kls in known if kls)])


def heat(kl: float | None, scale: float) -> Style:
    """Return the style of a token; the report's page has the same scale, by the square root."""
    share = min(math.sqrt(max(kl or 0.0, 0.0) / scale), 1.0) if kl is None or math.isfinite(kl) else 1.0
    if share < FAINT:
        return Style()
    return Style(color="black", bgcolor=f"rgb(255,{round(235 - 150 * share)},{round(200 - 160 * share)})")


def finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def means(views: TokenViews) -> dict[str, float | None]:
    """Return the means over the tokens that are compared: None if there are none."""
    names = ("kl_forward", "kl_reverse", "loss", "entropy")
    return {name: fmean(values) if (values := finite(getattr(views, name))) else None for name in names}


def summary(views: TokenViews) -> str:
    """Return the means as a sentence."""
    found, number = means(views), len(finite(views.kl_forward))
    left = len(views.kl_forward) - number
    if not number:
        return "no token of the answer can be compared"
    text = ", ".join(
        f"{label} {found[name]:.4g}"
        for name, label in (("kl_forward", "KL"), ("kl_reverse", "reverse KL"), ("loss", "loss"))
    )
    return f"means of {number} tokens: {text}" + (f"; {left} tokens are left out" if left else "")


def highest(found: AnswerKl) -> Table:
    """Return the tokens of the highest KL, with both models' likeliest tokens there and their probabilities."""
    views, table = found.views, Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("at", justify="right")
    table.add_column("token")
    table.add_column("KL", justify="right")
    table.add_column("student", ratio=1)
    table.add_column("teacher", ratio=1)
    known = [(kl, at) for at, kl in enumerate(views.kl_forward) if kl is not None]
    for kl, at in nlargest(NUM_HIGHEST, known, key=lambda one: (math.isnan(one[0]), one[0], -one[1])):
        sides = (
            (views.student_top_ids[at], views.student_top_logp[at]),
            (views.teacher_top_ids[at], views.teacher_top_logp[at]),
        )
        tops = [likely(ids, logps, found.likeliest) for ids, logps in sides]
        table.add_row(str(at), Text(quoted(found.texts[at])), f"{kl:.4g}", *map(Text, tops))
    return table


def likely(ids: Sequence[int], logps: Sequence[float], text_of: Callable[[int], str]) -> str:
    """Return the likeliest tokens with their probabilities, without those of almost none."""
    pairs = list(zip(ids, logps, strict=True))[:NUM_LIKELIEST]
    kept = [pair for place, pair in enumerate(pairs) if place == 0 or math.exp(pair[1]) >= LEAST]
    return ", ".join(f"{quoted(text_of(token))} {math.exp(logp):.2%}" for token, logp in kept)


def quoted(text: str) -> str:
    """Return a token's text in one line."""
    return "'" + printable(text).replace("\n", "\\n").replace("\t", "\\t") + "'"


def as_json(found: AnswerKl, pair: Pair) -> dict[str, Any]:
    """Return an answer's KL as JSON: what it is of, the means, and lists of a value each token."""
    of, loss = describe(pair)
    views, names = found.views, ("kl_forward", "kl_reverse", "loss", "student_logp", "teacher_logp")
    by_token = {name: [None if not finite([one]) else one for one in getattr(views, name)] for name in names}
    tops = {
        f"{role}_top": [
            [[found.likeliest(token), round(math.exp(logp), 6)] for token, logp in zip(ids, logps, strict=True)]
            for ids, logps in zip(getattr(views, f"{role}_top_ids"), getattr(views, f"{role}_top_logp"), strict=True)
        ]
        for role in ("student", "teacher")
    }
    return {"of": of, "trained": loss, "mean": means(views), "tokens": found.texts, **by_token, **tops}
