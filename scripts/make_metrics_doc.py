"""Write docs/metrics.md from the declarations in distill_cli/metrics.py.

python scripts/make_metrics_doc.py            # write it
python scripts/make_metrics_doc.py --check    # exit with status 1 if it is not current
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill_cli.metrics import METRICS, Metric

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
INTRODUCTION = """\
# Metrics

The metrics in a line of a run's `metrics.jsonl`, in addition to `step` and `time` (seconds since 1970). Trackers get
all. `python scripts/make_metrics_doc.py` writes this page from `distill_cli/metrics.py`; a test checks that it is
current.

`checkpoint.metric` may be any train/, rollout/ or val/ metric that is measured during training. If the metric has no
better direction of its own, `checkpoint.higher_is_better` must be set.

| metric | meaning | unit | better | in the printed line | needs |
|---|---|---|---|---|---|
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    page = INTRODUCTION + "".join(row(metric) for metric in METRICS)
    if not parser.parse_args().check:
        PAGE.write_text(page)
        return 0
    if PAGE.read_text() == page:
        return 0
    print("docs/metrics.md is not current: python scripts/make_metrics_doc.py", file=sys.stderr)
    return 1


def row(metric: Metric) -> str:
    name = metric.step_line.partition("=")[0]
    cells = (f"`{metric.name}`", metric.meaning, metric.unit, metric.better or "", _code(name), _code(metric.needs))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    sys.exit(main())
