"""Local copies of published datasets: their names on the hub, splits and columns, with a few rows of our own.

A YAML of conf/data whose dataset is not here fails its test: its published columns go here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

QUESTION = "What is 3 + 4?"
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "It is 7."}]
MATHARENA = {"problem_idx": 1, "problem": QUESTION, "answer": 7, "problem_type": ["Algebra"]}
SCHEMAS: dict[str, tuple[tuple[str, ...], str | None, dict[str, Any]]] = {
    # name on the hub: splits, configuration, one row
    "agentica-org/DeepScaleR-Preview-Dataset": (
        ("train",),
        None,
        {"problem": QUESTION, "answer": "7", "solution": "Count on from three."},
    ),
    "nvidia/OpenMathInstruct-2": (
        ("train", "train_1M"),
        None,
        {"problem": QUESTION, "generated_solution": r"\boxed{7}", "expected_answer": "7", "problem_source": "math"},
    ),
    "openai/gsm8k": (("train", "test"), "main", {"question": QUESTION, "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}),
    "HuggingFaceH4/MATH-500": (
        ("test",),
        None,
        {
            **{"problem": QUESTION, "solution": r"It is $\boxed{7}$.", "answer": "7"},
            **{"subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json"},
        },
    ),
    "HuggingFaceH4/aime_2024": (
        ("train",),
        None,
        {"id": 60, "problem": QUESTION, "solution": "...", "answer": "7", "url": "https://", "year": "2024"},
    ),
    "MathArena/aime_2025": (("train",), None, MATHARENA),
    "MathArena/aime_2026": (("train",), None, MATHARENA),
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        ("train",),
        None,
        {
            "data_source": "math_dapo",
            "prompt": [{"content": QUESTION, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": "7", "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4"},
        },
    ),
    "allenai/RLVR-IFeval": (
        ("train",),
        None,
        {
            "messages": [{"content": QUESTION, "role": "user"}],
            "ground_truth": '{"func_name": "validate_lowercase"}',
            **{"dataset": "ifeval", "constraint_type": "All Lowercase", "constraint": "all in lowercase"},
        },
    ),
    "HuggingFaceH4/ultrachat_200k": (
        ("train_sft", "test_sft"),
        None,
        {"prompt": QUESTION, "prompt_id": "f0", "messages": CHAT},
    ),
}


def make_copy(name: str, folder: Path, *, num_rows: int = 5) -> Path:
    """A folder like the hub's repository of that name; the question of row i ends with i spaces' worth of a number."""
    splits, config, row = SCHEMAS[name]
    repository = folder / name
    (repository / "data").mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:", f"- config_name: {config or 'default'}", "  data_files:"]
    for split in splits:
        rows = [numbered(row, f"{split} {number}") for number in range(num_rows)]
        pq.write_table(pa.Table.from_pylist(rows), repository / "data" / f"{split}-00000-of-00001.parquet")
        lines += [f"  - split: {split}", f"    path: data/{split}-*.parquet"]
    (repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    return repository


def numbered(value: Any, number: str) -> Any:
    """The row with its question made unlike the others'."""
    if isinstance(value, Mapping):
        return {key: numbered(part, number) for key, part in value.items()}
    if isinstance(value, list):
        return [numbered(part, number) for part in value]
    return f"{QUESTION} ({number})" if value == QUESTION else value


def localize(spec: Any, folder: Path) -> Any:
    """A source's keys with each published name replaced by a local copy."""
    if not isinstance(spec, Mapping):
        return spec
    local = {key: localize(value, folder) for key, value in spec.items()}
    if local.get("source") == "table":
        local["path"] = str(make_copy(local["path"], folder))
    return local
