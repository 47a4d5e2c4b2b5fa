"""Writes docs/metrics.md from the declarations in distill_cli/metrics.py.

python scripts/make_metrics_doc.py            # writes it
python scripts/make_metrics_doc.py --check    # status 1 if it is not current
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distill_cli.metrics import METRICS, Metric

PAGE = Path(__file__).parent.parent / "docs/metrics.md"
INTRODUCTION = """\
# Metrics

What a line of a run's `metrics.jsonl` may hold, besides `step` and `time` (seconds since 1970). MLflow gets all of it.
This page is made by `python scripts/make_metrics_doc.py` from [`metrics.py`](../distill_cli/metrics.py); a test keeps
it current.

`checkpoint.metric` may be any train/, rollout/ or val/ metric that is measured during training. If neither high nor low
is better by itself, `checkpoint.higher_is_better` must say which checkpoints are kept.

| metric | is | unit | better | in a step's line | needs |
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
