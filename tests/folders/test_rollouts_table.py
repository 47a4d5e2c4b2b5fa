"""Recorded rollouts: values by token belong to their tokens, also between observations of an environment."""

import logging
from dataclasses import fields
from pathlib import Path

import pyarrow.parquet
import pytest

from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.types import Example, Prompt, Rollout, Sample, TokenViews


def test_token_lists_match_the_response(tmp_path: Path) -> None:
    trained = [True, False, False, True]
    sample = Sample([5, 6, 7, 8], [-1.0, 0.0, 0.0, -1.0], "stop", trained=trained, num_turns=2)
    views = TokenViews(
        **{
            field.name: [([1], [-0.5])["logp" in field.name] if known else [] for known in trained]
            if "_top_" in field.name
            else [0.5 if known else None for known in trained]
            for field in fields(TokenViews)
        }
    )
    rollout = Rollout(Prompt(0, [1, 2], Example("?")), sample)
    folder = RolloutsFolder(tmp_path, decode=lambda ids: " ".join(map(str, ids)), token_text=str)
    file = folder.write("step_0.parquet", [rollout], views=[views])
    (row,) = pyarrow.parquet.read_table(file).to_pylist()
    assert row["tokens"] == ["5", "6", "7", "8"]
    assert row["kl_forward"] == [0.5, None, None, 0.5]
    assert {len(value) for name, value in row.items() if isinstance(value, list) and name != "prompt_ids"} == {4}


def test_unwritable_rollouts_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rollouts = [Rollout(Prompt(0, [1], Example("?")), Sample([2], None, "stop", source="dataset"))]
    (tmp_path / "file").write_text("no folder can be made here")
    for is_written, warnings in ((False, 0), (True, 1)):
        folder = RolloutsFolder(tmp_path / "file", decode=str, token_text=str, is_written=is_written)
        with caplog.at_level(logging.WARNING):
            assert folder.write("a.parquet", rollouts) == tmp_path / "file/a.parquet"
        assert len(caplog.records) == warnings
    file = RolloutsFolder(tmp_path, decode=str, token_text=str).write("b.parquet", rollouts)
    assert pyarrow.parquet.read_table(file).to_pylist()[0]["sampled_logp"] is None
