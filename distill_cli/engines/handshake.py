"""The handshake with a teacher: a few answers that show, by numbers, that its scores are what training takes them for.

A teacher that wakes without its weights, scores the tokens one position too late or leaves out the temperature gives
numbers that look like any others: the loss falls, and the student learns noise. So before the first step the teacher
writes a few answers to prompts of the data and scores them, and what it scored must fit what it wrote. Later the same
answers must have the same scores: after a sleep, on a server that was restarted, in a resumed run (`differs`).

Shape letters: R response tokens, K the teacher's top-k.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from distill_cli.engines.base import Teacher
from distill_cli.engines.settings import SamplingSettings
from distill_cli.types import TeacherScores

NUM_PROMPTS, ANSWER_TOKENS = 4, 8
CUTS, DRAWS, HOT = 4, 6, 2.0
"""Places at which a prompt is cut off, tokens that are drawn at each, and their temperature: likely and unlikely ones
are compared, and a teacher may be sure of its answers, but hardly of the middle of a question."""
APART = 0.5
"""Least distance of a likely and an unlikely token, in nats."""
SPREAD = 1e-3
"""Smallest difference of a likeliest token's log-probability from the uniform distribution's."""


EXACT, NEARLY_EXACT, ROUNDED = 2e-3, 2e-2, 0.5
"""Largest differences that rounding explains, in nats: with float32 on this CPU, with float32 somewhere else, and
otherwise: bfloat16 has three digits for logits of some tens, and sampling and scoring round at different places."""


@dataclass(frozen=True)
class Probe:
    """Sequences that a teacher wrote, and its scores of them."""

    sequences: list[list[int]]
    starts: list[int]
    """Index of each response's first token."""
    raw_logp: list[list[float]]
    """Log-probabilities of the response tokens at temperature 1, by the engine that sampled them."""
    num_greedy: int
    """The first sequences are greedy answers; the others end with one token that was drawn hot."""
    scores: list[TeacherScores]


@dataclass(frozen=True)
class Answer:
    """What the probe says about one property of a teacher."""

    what: str
    problem: str | None
    """None if it is as it should be."""
    text: str
    """The number behind it."""


def make_probe(teacher: Teacher, prompts: Sequence[list[int]]) -> Probe:
    """Let an awake teacher answer prompts of the data and score its answers.

    All ranks that share the engine call it with the same prompts.
    """
    chosen, first = list(prompts[:NUM_PROMPTS]), prompts[0]
    cut_off = [first[: max(1, len(first) * cut // CUTS)] for cut in range(1, CUTS + 1) for _ in range(DRAWS)]
    greedy = SamplingSettings(max_new_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    hot = SamplingSettings(max_new_tokens=1, temperature=HOT, ignore_eos=True)
    samples = teacher.sample(chosen, seeds=[0] * len(chosen), sampling=greedy)
    samples += teacher.sample(cut_off, seeds=range(len(cut_off)), sampling=hot)
    asked = [*chosen, *cut_off]
    sequences = [prompt + sample.token_ids for prompt, sample in zip(asked, samples, strict=True)]
    starts = [len(prompt) for prompt in asked]
    scores = teacher.score(sequences, response_starts=starts)
    return Probe(sequences, starts, [sample.logp or [] for sample in samples], len(chosen), scores)


def answers(probe: Probe, *, topk: int, vocab_size: int, temperature: float, limit: float) -> Iterator[Answer]:
    """Yield what the probe says of each property, the most basic first; nothing follows scores that say nothing.

    Args:
        vocab_size: ids that are scored.
        temperature: `loss.temperature`, at which scores should be.
        limit: EXACT or ROUNDED.
    """
    whole = TeacherScores.cat(probe.scores)
    if problem := suspicion(probe.scores, vocab_size=vocab_size):
        yield Answer("scores", problem, problem)
        return
    yield Answer("scores", None, "finite, and not the same at every token")
    number, mass = whole.topk_ids.shape[1], float(whole.topk_logp.double().exp().sum(-1).max())
    is_sorted = bool((whole.topk_logp.diff(dim=-1) <= 1e-6).all()) and _are_distinct(whole.topk_ids)
    found = f"{number} tokens, together {mass:.4f} at most"
    is_good = number == topk and is_sorted and mass <= 1 + 1e-3
    yield Answer("top-k", None if is_good else f"its top-k is not one of {topk} tokens: {found}", found)
    lag = position_lag(probe)
    found = f"{lag:.2g} nats below the likeliest (limit {limit:g})"
    yield Answer("position", None if lag < limit else f"scores other tokens than those it is given: {found}", found)
    error = temperature_error(probe, temperature=temperature)
    found = f"{error:.2g} nats off at temperature {temperature:g} (limit {limit:g})"
    yield Answer("temperature", None if error < limit else f"does not score at loss.temperature: {found}", found)


def _are_distinct(ids_RK: torch.Tensor) -> bool:
    return bool((ids_RK.sort(dim=-1).values.diff(dim=-1) != 0).all())


def suspicion(parts: Sequence[TeacherScores], *, vocab_size: int) -> str | None:
    """Return why scores cannot be those of a teacher with weights, as text that follows its name; None if they may be.

    Args:
        parts: of sequences in several contexts, in which a teacher does not give the same distribution.
    """
    if parts and parts[0].topk_logp.shape[1] == 0:
        return _hidden_suspicion(torch.cat([scores.hidden for scores in parts]))
    likeliest = torch.cat([scores.topk_logp[:, 0] for scores in parts])
    sampled = torch.cat([scores.sampled_logp for scores in parts])
    if len(likeliest) == 0:
        return None
    # A tail of -inf is a model's that rules tokens out; a NaN is no number below.
    is_finite = bool(likeliest.isfinite().all()) and bool((sampled <= 1e-3).all())
    if not is_finite or not all(bool((scores.topk_logp <= 1e-3).all()) for scores in parts):
        return "gives scores that are not finite"
    if bool((likeliest + math.log(vocab_size)).abs().max() < SPREAD):
        return f"gives every token the same probability, 1/{vocab_size}: it has no weights"
    if len(likeliest) > 1 and bool((likeliest == likeliest[0]).all()):
        whole = TeacherScores.cat(parts)
        if all(bool((rows == rows[0]).all()) for rows in (whole.topk_logp, whole.topk_ids)):
            return "gives the same scores at every token"
    return None


def _hidden_suspicion(hidden_RH: torch.Tensor) -> str | None:
    if not bool(hidden_RH.isfinite().all()):
        return "gives hidden states that are not finite"
    if len(hidden_RH) > 1 and bool((hidden_RH == hidden_RH[0]).all()):
        return "gives the same hidden state at every token"
    return None


def position_lag(probe: Probe) -> float:
    """Return how far tokens that the teacher wrote greedily are below the likeliest at their places: the mean, in nats.

    They are looked up in the top-k, where they must have the log-probability that the scores give them as the
    positions' own. An average, since two tokens may be as likely up to rounding.
    """
    lags = []
    for ids, start, scores in zip(probe.sequences, probe.starts, probe.scores[: probe.num_greedy], strict=False):
        is_own_RK = scores.topk_ids == torch.tensor(ids[start:])[:, None]
        in_topk_R = scores.topk_logp.masked_fill(~is_own_RK, -torch.inf).amax(-1)
        own_R = torch.where(is_own_RK.any(-1), in_topk_R, scores.topk_logp[:, -1])  # outside it is below the last
        lags.append(scores.topk_logp[:, 0] - torch.minimum(own_R, scores.sampled_logp))
    return float(torch.cat(lags).mean())


def temperature_error(probe: Probe, *, temperature: float) -> float:
    """Return by how much scores of unlikely tokens differ from what sampling reported, the median: nats.

    The distance of two tokens of one position at a temperature is that at 1, divided by the temperature. It is compared
    between the tokens that were drawn hot, the likeliest and the others; 0 if all of a place are as likely.
    """
    by_context: dict[tuple[int, ...], list[tuple[float, float]]] = defaultdict(list)
    rows = list(zip(probe.sequences, probe.raw_logp, probe.scores, strict=True))
    for ids, logp, scores in rows[probe.num_greedy :]:
        by_context[tuple(ids[:-1])].append((logp[0], float(scores.sampled_logp[0])))
    errors = []
    for pairs in by_context.values():
        (most, found), *others = sorted(pairs, reverse=True)
        errors += [abs((raw - most) / temperature - (one - found)) for raw, one in others if most - raw > APART]
    return median(errors) if errors else 0.0


def top_difference(scores: TeacherScores, logp_RK: torch.Tensor) -> float:
    """Return by how much scores differ from other log-probabilities of their top-k, weighted by theirs: a mean, nats.

    Args:
        logp_RK: [R, K]
    """
    weights_RK = scores.topk_logp.double().exp()
    return float(((logp_RK.double().cpu() - scores.topk_logp.double()).abs() * weights_RK).sum(-1).mean())


def difference(before: Sequence[TeacherScores], now: Sequence[TeacherScores], *, limit: float) -> str | None:
    """Return how scores differ from those of the same sequences before, as text that follows a name; None if not."""
    old, new = TeacherScores.cat(before), TeacherScores.cat(now)
    apart = float((old.sampled_logp - new.sampled_logp).abs().mean())
    same = float((old.topk_ids[:, 0] == new.topk_ids[:, 0]).float().mean())
    if apart <= limit and same > 0.5:  # a NaN is not
        return None
    return f"gives other scores than before: {apart:.2g} nats a token off, {same:.0%} of the likeliest tokens the same"


def to_tensors(probe: Probe) -> dict[str, torch.Tensor]:
    """Return a probe as tensors for a safetensors file; `from_tensors` reads them."""
    whole = TeacherScores.cat(probe.scores)
    return {
        "token_ids": torch.tensor([token for ids in probe.sequences for token in ids]),
        "lengths": torch.tensor([len(ids) for ids in probe.sequences]),
        "starts": torch.tensor(probe.starts),
        "topk_ids": whole.topk_ids.contiguous(),
        "topk_logp": whole.topk_logp.contiguous(),
        "sampled_logp": whole.sampled_logp.contiguous(),
    }


def from_tensors(tensors: dict[str, torch.Tensor]) -> Probe:
    """Return a probe of which only the sequences and scores are known."""
    lengths, starts = tensors["lengths"].tolist(), tensors["starts"].tolist()
    sequences = [part.tolist() for part in tensors["token_ids"].split(lengths)]
    rows = [length - start for length, start in zip(lengths, starts, strict=True)]
    parts = [tensors[name].split(rows) for name in ("topk_ids", "topk_logp", "sampled_logp")]
    scores = [TeacherScores.of_topk(*fields) for fields in zip(*parts, strict=True)]
    return Probe(sequences, starts, [], 0, scores)
