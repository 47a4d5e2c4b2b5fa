"""The math verifier on ten thousand pairs and on 200 labelled ones: failures, the slowest, right and wrong calls.

    python scripts/bench_verifier.py [--pairs 10000]

Labelled pairs are made by kind: the same value written in two ways is right, another value wrong. The ten thousand are
those kinds with other numbers, and responses that were cut, garbled or nested.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable

from distill_cli.data.isolated import GRACE_S, LIMIT_S, IsolatedVerifier

Pair = tuple[str, str, bool]
"""A response, an answer, and whether the one says the other."""


def integer(a: int, b: int) -> Pair:
    return rf"It is \boxed{{{a:,}}}.", str(a), True


def other_integer(a: int, b: int) -> Pair:
    return rf"It is \boxed{{{a}}}.", str(a + b), False


def fraction(a: int, b: int) -> Pair:
    return rf"so \boxed{{\frac{{{2 * a}}}{{{2 * b}}}}}", rf"\frac{{{a}}}{{{b}}}", True


def other_fraction(a: int, b: int) -> Pair:
    return rf"so \boxed{{\frac{{{a}}}{{{b}}}}}", rf"\frac{{{a + 1}}}{{{b}}}", False


def decimal(a: int, b: int) -> Pair:
    return f"That makes {a / 8} in all.", rf"\frac{{{a}}}{{8}}", True


def units(a: int, b: int) -> Pair:
    return rf"The length is $\boxed{{{a}\text{{ cm}}}}$", str(a), True


def other_units(a: int, b: int) -> Pair:
    return rf"The length is $\boxed{{{a}\text{{ cm}}}}$", rf"{a + b}\text{{ cm}}", False


def interval(a: int, b: int) -> Pair:
    return rf"$x \in \boxed{{[{a}, {a + b})}}$", f"[{a},{a + b})", True


def other_interval(a: int, b: int) -> Pair:
    return rf"$x \in \boxed{{[{a}, {a + b}]}}$", f"[{a},{a + b})", False


def solutions(a: int, b: int) -> Pair:
    return rf"\boxed{{\{{{a + b}, {a}\}}}}", rf"\{{{a}, {a + b}\}}", True


def other_solutions(a: int, b: int) -> Pair:
    return rf"\boxed{{\{{{a}\}}}}", rf"\{{{a}, {a + b}\}}", False


def root(a: int, b: int) -> Pair:
    return rf"\boxed{{\sqrt{{{a * b * b}}}}}", rf"{b}\sqrt{{{a}}}", True


def polynomial(a: int, b: int) -> Pair:
    return rf"\boxed{{(x+{a})(x-{b})}}", f"x^2 + {a - b}x - {a * b}" if a >= b else f"x^2 - {b - a}x - {a * b}", True


def other_polynomial(a: int, b: int) -> Pair:
    return rf"\boxed{{(x+{a})(x+{b})}}", f"x^2 - {a + b}x - {a * b}", False


def last_of_two(a: int, b: int) -> Pair:
    return rf"At first \boxed{{{a + b}}}, but no: \boxed{{{a}}}", str(a), True


def first_of_two(a: int, b: int) -> Pair:
    return rf"At first \boxed{{{a}}}, but no: \boxed{{{a + b}}}", str(a), False


def percent(a: int, b: int) -> Pair:
    return rf"\boxed{{{a}\%}}", rf"{a}\%", True


def negative(a: int, b: int) -> Pair:
    return rf"\boxed{{-{a}}}", str(a), False


def nothing(a: int, b: int) -> Pair:
    return "I cannot say what it is.", str(a), False


def equation(a: int, b: int) -> Pair:
    return rf"Hence $x = {a}$.", str(a), True


KINDS: list[Callable[[int, int], Pair]] = [
    *(integer, other_integer, fraction, other_fraction, decimal, units, other_units, interval, other_interval),
    *(solutions, other_solutions, root, polynomial, other_polynomial, last_of_two, first_of_two, percent, negative),
    *(nothing, equation),
]
HOSTILE = [
    *("", "\\", "$", "\\boxed{", "{" * 500, "\\frac{" * 300, "((((" * 200 + "1", "\\boxed{9^{9^{9^{9}}}}", "\x00\x01"),
    *("\ud800", "∑∫∞", "\\boxed{\\int_0^\\infty e^{-x^2} dx}", "\\boxed{" + "1+" * 800 + "1}", "\\boxed{10!!!!}"),
    *("\\boxed{" + "x" * 1500 + "}", "$$\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}$$", "\\boxed{\\text{no}}", "9" * 5000),
]


def labelled(number: int, *, seed: int) -> list[tuple[str, Pair]]:
    """Pairs of all kinds in turn."""
    rng = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(number)]
    return [(kind.__name__, kind(rng.randint(2, 99), rng.randint(2, 9))) for kind in kinds]


def garbled(pair: Pair, rng: random.Random) -> Pair:
    """The response cut somewhere, with a character changed, or twice."""
    response, answer, _ = pair
    at = rng.randrange(len(response))
    change = rng.choice(["cut", "replace", "double"])
    text = {
        "cut": response[:at],
        "replace": response[:at] + rng.choice("{}\\$^_()%") + response[at + 1 :],
        "double": response[at:] + response,
    }[change]
    return text, answer, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=10_000)
    number = parser.parse_args().pairs
    verify, rng = IsolatedVerifier("math"), random.Random(1)
    verify([("1", "1")])  # starts the process
    calls: Counter = Counter()
    wrong = []
    pairs = labelled(200, seed=0)
    scores = verify([(response, answer) for _, (response, answer, _) in pairs])
    for (kind, (response, answer, right)), score in zip(pairs, scores, strict=True):
        said = score == 1
        calls[(right, said)] += 1
        if said != right:
            wrong.append((kind, response, answer))
    print("200 labelled pairs       called right   called wrong")
    for right in (True, False):
        print(f"{'right' if right else 'wrong':<22}{calls[(right, True)]:>15}{calls[(right, False)]:>15}")
    for kind, response, answer in wrong:
        print(f"  not as labelled: {kind}: {response!r} against {answer!r}")
    pairs = [pair for _, pair in labelled(number // 2, seed=2)]
    pairs += [garbled(pair, rng) for _, pair in labelled(number - number // 2 - len(HOSTILE), seed=3)]
    pairs += [(text, "1", False) for text in HOSTILE]
    seconds = []
    verify.failures.take()
    for response, answer, _ in pairs:
        begin = time.perf_counter()
        verify([(response, answer)])
        seconds.append(time.perf_counter() - begin)
    slowest = max(seconds)
    print(
        f"{len(pairs)} pairs: {sum(seconds):.0f} s, median {1000 * sorted(seconds)[len(seconds) // 2]:.1f} ms, slowest "
        f"{slowest:.1f} s, {sum(s > 1 for s in seconds)} above 1 s, {verify.failures.num_new} not judged; the limit is "
        f"{LIMIT_S:g} s (and {GRACE_S:g} s until the process is killed)"
    )
    verify.close()


if __name__ == "__main__":
    main()
