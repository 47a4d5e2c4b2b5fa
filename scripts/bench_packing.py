"""Measure how full micro-batches are on long-tailed lengths: real tokens over those the ranks could have computed.

    python scripts/bench_packing.py

Lengths are lognormal (median 1,000, sigma 1), cut at 8,192; a micro-batch has at most 16,384 tokens. The number of
sequences grows with the number of ranks, so that each rank has about as many micro-batches as the first column shows.
"""

import random
import time

from distill_cli.rollout.pack import plan_batch

MAX_LENGTH, MAX_TOKENS = 8192, 16384


def draw(num_tokens: int, seed: int) -> list[int]:
    generator, lengths = random.Random(seed), []
    while sum(lengths) < num_tokens:
        lengths.append(max(16, min(MAX_LENGTH, int(generator.lognormvariate(6.9, 1.0)))))
    return lengths


def main() -> None:
    print(f"{'rows / rank':>11} {'ranks':>5} {'sequences':>9} {'packed':>7} {'worst':>7} {'padded':>7} {'plan ms':>8}")
    for rows in (1, 2, 4, 8):
        for ranks in (1, 4, 8, 64):
            shares: dict[bool, list[float]] = {True: [], False: []}
            took = 0.0
            for seed in range(20):
                lengths = draw(int((rows - 0.5) * ranks * MAX_TOKENS), seed)
                for packing in (True, False):
                    begin = time.perf_counter()
                    plan = plan_batch(lengths, num_ranks=ranks, max_tokens=MAX_TOKENS, packing=packing)
                    took += time.perf_counter() - begin if packing else 0.0
                    shares[packing].append(plan.num_tokens / plan.computed_tokens)
            packed, padded = (sum(values) / len(values) for values in shares.values())
            print(
                f"{rows:11} {ranks:5} {len(lengths):9} {packed:7.1%} {min(shares[True]):7.1%} {padded:7.1%} "
                f"{took / 20 * 1e3:8.2f}"
            )


if __name__ == "__main__":
    main()
