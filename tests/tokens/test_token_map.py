"""Special tokens of two tokenizers, and tokens that a model has no ids for."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from distill_cli.tokens.align import LEFT_OUT, align
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, ByteVocabulary
from distill_cli.tokens.token_map import Ends, TokenMap
from tests.tokens.vocabularies import byte_level, write


def with_added(folder: Path, added: Sequence[AddedToken]) -> Path:
    """Write a tokenizer with further tokens; its first ids are those of the letters a, b and of <end>."""
    tokenizer = Tokenizer.from_file(str(byte_level(folder, []) / "tokenizer.json"))
    tokenizer.add_tokens(list(added))
    return write(tokenizer, folder)


def map_of_added(tmp_path: Path, student: AddedToken, teacher: AddedToken) -> TokenMap:
    folders = with_added(tmp_path / "student", [student]), with_added(tmp_path / "teacher", [teacher])
    vocabularies = [ByteVocabulary.read(folder) for folder in folders]
    return TokenMap(*vocabularies, ends=Ends([2], [2]), teacher_ids=vocabularies[1].size)


@pytest.mark.parametrize("is_special", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("names", [("<think>", "<think>"), ("<mark>", "<mark>"), ("<think>", "[THINK]")])
def test_added_tokens_meet(tmp_path: Path, is_special: tuple[bool, bool], names: tuple[str, str]) -> None:
    """One family's thought begins with a special token, and another's with a plain one that was added."""
    added = [AddedToken(name, special=special) for name, special in zip(names, is_special, strict=True)]
    tokens = map_of_added(tmp_path, *added)
    alignment = align([0, 3, 1, 2], tokens)
    assert alignment.teacher_ids == [0, 3, 1, 2]
    assert alignment.places_R4[:, 0].tolist() == [0, 1, 2, 3]
    assert tokens.first[3] == 3


def test_other_special_tokens_stay_apart(tmp_path: Path) -> None:
    tokens = map_of_added(tmp_path, AddedToken("<mine>", special=True), AddedToken("<yours>", special=True))
    alignment = align([0, 3, 1], tokens)
    assert alignment.teacher_ids == [0, 1]
    assert tuple(alignment.places_R4[1]) == LEFT_OUT
    assert tokens.first[3] == NO_TOKEN


def test_models_may_have_fewer_ids(tmp_path: Path) -> None:
    """A tokenizer's last tokens have no rows in a head that was not enlarged with it."""
    folder = byte_level(tmp_path, [("a", "b"), ("ab", "ab"), ("abab", "ab")])  # a b ab abab ababab <end>
    whole = ByteVocabulary.read(folder)
    part = whole.within(3)
    assert whole.size == 6
    assert part.encode(b"abab") == [(NO_TOKEN, 4)]
    assert part.first(b"abab") == 2
    assert part.special == {}
    tokens = TokenMap(part, whole, ends=Ends([0], [5]), teacher_ids=6)
    assert tokens.first.max() < 3
    assert align([0, 1, 0, 1], TokenMap(whole, part, ends=Ends([5], []), teacher_ids=3)).teacher_ids == []
