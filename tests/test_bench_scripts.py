"""scripts/bench_*.py: what they compute from a run's figures."""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

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


def test_drawn_lengths_are_lognormal() -> None:
    script = runpy.run_path(str(SCRIPTS / "length_model.py"))
    facts = script["facts_of"](median=200, sigma=1, longest=2048)
    assert facts["median"] == pytest.approx(200, rel=0.02)
    assert facts["sigma"] == pytest.approx(0.99, abs=0.01)  # cut at 2,048
    ends, moves = script["transitions"](script["place_times"](64), median=20, sigma=0.5)
    probability = script["length_distribution"](ends, moves, longest=64)
    assert probability.sum() == pytest.approx(1)
    assert float((probability * torch.arange(1, 65)).sum()) == pytest.approx(20 * math.exp(0.125), rel=0.03)


def test_schedules_count_their_work() -> None:
    """Equal lengths: what each schedule reads and decodes is known."""
    script = runpy.run_path(str(SCRIPTS / "simulate_schedule.py"))
    schedule, lengths = script["Schedule"], script["Lengths"](median=100, sigma=0, longest=1000, prompt=10)
    whole = script["counts"](schedule(sequences=8, trainers=2), lengths)
    assert whole == {
        **{"decodes": 100, "batched": 400, "prefill": 40, "read": 440, "responses": 400, "tokens": 800, "one": 1}
    }
    parts = script["counts"](schedule(sequences=8, trainers=2, per_slot=50), lengths)
    assert (parts["decodes"], parts["batched"], parts["tokens"]) == (50, 200, 400)
    assert parts["read"] == pytest.approx((400 + 8 * (25 + 1.5 * 10)) / 2, rel=0.1)  # half of the time 50 are carried
    apart = script["counts"](schedule(sequences=8, trainers=1, samplers=3, ahead=True), lengths)
    assert (apart["decodes"], apart["batched"], apart["read"]) == (100, 300, 880)


def test_costs_are_recovered_from_their_times() -> None:
    script = runpy.run_path(str(SCRIPTS / "simulate_schedule.py"))
    lengths, schedule = script["Lengths"](), script["Schedule"]
    true = script["Costs"]({"sample": [3e-3, 1e-4, 1e-5, 0.1], "score": [2e-5, 0.0], "train": [1e-4, 2e-5, 0.2]}, 0.1)
    runs = [schedule(sequences=n, trainers=1, per_slot=q) for n in (16, 64) for q in (0, 128, 512)]
    measured = [(one, {**true.step(one, lengths), "sync": 0.1}) for one in runs]
    found = script["fit"](measured, lengths)
    for one in (*runs, schedule(sequences=32, trainers=2, samplers=2, ahead=True)):
        assert found.step(one, lengths)["step"] == pytest.approx(true.step(one, lengths)["step"], rel=1e-3)
