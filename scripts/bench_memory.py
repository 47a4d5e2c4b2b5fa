"""Print the peak memory of an optimizer update on CPU ranks, measured and predicted, in MiB per rank.

python scripts/bench_memory.py [WORDS...]      # only cases whose name contains one of the words
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.student.measured_memory import TABLE, measure, predict

LIMIT = 0.15


def main() -> None:
    words = sys.argv[1:]
    cases = {name: case for name, case in TABLE.items() if not words or any(word in name for word in words)}
    found, worst = measure(cases.values()), 0.0
    for name, case in cases.items():
        measured, predicted = found[case], predict(case)
        if worst == 0.0:
            print(f"| case, measured / predicted | {' | '.join(measured)} | peak off by |\n|{'---|' * 6}")
        off = predicted["peak"] / measured["peak"] - 1
        cells = (f"{measured[part] / 2**20:.0f} / {predicted[part] / 2**20:.0f}" for part in measured)
        print(f"| {name} | {' | '.join(cells)} | {off:+.1%} |")
        worst = max(worst, abs(off))
    print(f"largest {worst:.1%}, limit {LIMIT:.0%}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
