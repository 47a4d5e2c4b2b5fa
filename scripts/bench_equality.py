"""How much each layout differs from one plain rank in float32, after five optimizer steps: one table.

python scripts/bench_equality.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from student.layouts import TABLE, reference_of, train

LIMIT = 1e-5


def main() -> None:
    outcomes = train([*TABLE.values(), *map(reference_of, TABLE.values())])
    print(f"{'layout':45} {'ranks':>5} {'loss':>9} {'grad norm':>9} {'params':>9}")
    worst = 0.0
    for name, layout in TABLE.items():
        found = outcomes[layout].difference(outcomes[reference_of(layout)])
        print(f"{name:45} {layout.ranks:5} " + " ".join(f"{value:9.1e}" for value in found.values()))
        worst = max(worst, *found.values())
    print(f"largest {worst:.1e}, limit {LIMIT:.0e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
