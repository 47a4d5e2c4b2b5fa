"""The record of families that were tried, and what `distill ls families` prints of it."""

from distill_cli.models.tried_families import Family, failure, tried
from distill_cli.verbs.ls import family_lines
from tests.families import FAMILIES


def test_record_is_of_families_that_exist() -> None:
    assert tried().keys() <= FAMILIES.keys()


def test_every_family_has_a_line() -> None:
    lines = family_lines()
    assert len(lines) == len(tried()) + 2
    assert lines[0].split()[:4] == ["family", "student", "LoRA", "teacher"]


def test_numbers_are_yes_and_texts_no() -> None:
    layouts = {"one rank": 2e-7, "shard": 5e-7, "tensor": "its layers are not cut", "context": 1e-7}
    one = Family("made_up", layouts, {"full": "ok", "lora": "sampler and trainer agree: 0.3"})
    assert one.trains
    assert one.axes() == ["shard", "context"]
    assert one.difference == 5e-7
    assert one.is_served
    assert not Family("made_up", {"one rank": "differs by 1e-3 in lm_head"}, {}).trains
    assert failure("never_tried", "tensor") is None
