"""Losses, sampled tokens, scores and parameters of every kind of job against `numbers.json`.

Made by `scripts/record_numbers.py --out`. On the processor and torch that recorded them they are the same to the last
bit; on others rounding differs, and with it, soon, the sampled tokens: there the first step is compared.
"""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts/record_numbers.py"))
RECORDED = json.loads((Path(__file__).parent / "numbers.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPT["COMMANDS"])
@pytest.mark.exhaustive
def test_numbers_are_the_recorded_ones(folder: Path, name: str) -> None:
    found, recorded = SCRIPT["numbers"](folder, name), RECORDED["runs"][name]
    if SCRIPT["processor"]() == RECORDED["processor"]:
        assert SCRIPT["differences"](recorded, found) == []
        return
    for run, values in recorded.items():
        ours, theirs = found[run]["metrics"]["1"], values["metrics"]["1"]
        assert ours.keys() == theirs.keys()
        for key in ("train/loss", "train/kl_forward", "train/kl_reverse", "train/entropy", "rollout/mean_length"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-2), key
