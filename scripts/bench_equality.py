"""Print how much each layout differs from one plain rank in float32, after five optimizer updates.

python scripts/bench_equality.py [WORDS...]    # only layouts whose name contains one of the words
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.student.layouts import TABLE, limit_of, reference_of, train


def main() -> None:
    words = sys.argv[1:]
    table = {name: layout for name, layout in TABLE.items() if not words or any(word in name for word in words)}
    outcomes = train([*table.values(), *map(reference_of, table.values())])
    print(f"{'layout':52} {'ranks':>5} {'loss':>9} {'grad norm':>9} {'params':>9}")
    worst = 0.0  # relative to the limit
    for name, layout in table.items():
        found = outcomes[layout].difference(outcomes[reference_of(layout)])
        print(f"{name:52} {layout.ranks:5} " + " ".join(f"{value:9.1e}" for value in found.values()))
        worst = max(worst, max(found.values()) / limit_of(layout))
    print(f"largest {worst:.0%} of its limit, which is 1e-5, for Gemma 3 {limit_of(TABLE['gemma3, context=2']):.0e}")
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
