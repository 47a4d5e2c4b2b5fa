"""scripts/bench_*.py: what they compute from a run's figures."""

import json
import runpy
from pathlib import Path

import pytest

from distill_cli.types import Example

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.mark.parametrize(
    ("seconds", "slope"), [([1.0, 2.0, 4.0], 1.0), ([3.0, 3.0, 3.0], 0.0), ([1.0, 4.0, 16.0], 2.0)]
)
def test_exponents_of_power_laws(seconds: list[int], slope: int) -> None:
    script = runpy.run_path(str(SCRIPTS / "bench_scaling.py"))
    assert script["exponent"]([10, 20, 40], seconds) == pytest.approx(slope)


def test_time_to_accuracy_includes_evaluations() -> None:
    script = runpy.run_path(str(SCRIPTS / "bench_vs_trl.py"))
    held_out = [Example("What is 1 + 1?", "2"), Example("What is 2 + 2?", "4")]
    rows = [
        {"step": 0, "time": 110.0, "answers": ["#### 3", "#### 4"]},
        {"step": 1, "time": 112.0, "time/step_s": 2.0, "time/sample_s": 1.0, "train/response_tokens": 10},
        {"step": 2, "time": 119.0, "time/step_s": 4.0, "train/response_tokens": 40, "answers": ["#### 2", "#### 4"]},
    ]
    found = script["figures"](rows, held_out, begin=100.0, end=125.0)
    assert (found["to first step, s"], found["to 99%, s"], found["to end, s"]) == (10, 19, 25)
    assert (found["accuracy at 0"], found["accuracy at 2"]) == (0.5, 1.0)
    assert (found["step, s"], found["tokens/s"]) == (3, 7.5)


def test_pair_gets_unused_end_token(tmp_path: Path) -> None:
    script = runpy.run_path(str(SCRIPTS / "bench_vs_trl.py"))
    added = [
        {"id": number, "content": name, "special": True} for number, name in enumerate(["<pad>", "<end>", "<file>"])
    ]
    for role in ("student", "teacher"):
        (folder := tmp_path / "pair" / role).mkdir(parents=True)
        (folder / "chat_template.jinja").write_text("{{ messages }}<end>")
        contents = {
            "config": {"eos_token_id": 1, "hidden_size": 4},
            "generation_config": {"eos_token_id": [1]},
            "tokenizer_config": {"eos_token": "<end>", "pad_token": "<pad>"},
            "tokenizer": {"added_tokens": added},
        }
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
    copy = script["with_unused_end"](tmp_path / "pair", tmp_path / "copy")
    read = {file.stem: json.loads(file.read_text()) for file in (copy / "student").glob("*.json")}
    assert read["config"] == {"eos_token_id": 2, "hidden_size": 4}
    assert read["generation_config"] == {"eos_token_id": 2}
    assert read["tokenizer_config"] == {"eos_token": "<file>", "pad_token": "<pad>"}
    assert read["tokenizer"] == {"added_tokens": added}
