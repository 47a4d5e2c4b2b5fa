"""A tokenizer as bytes: the bytes that each token stands for, and the tokens of any bytes. No torch.

Two tokenizers can be compared where both cut the same bytes. So a token is read as bytes whatever its tokenizer's
alphabet is: GPT-2's printable characters for bytes (byte-level BPE), or SentencePiece's text with a mark for spaces
(BPE or unigram, with or without tokens for single bytes).

Text is tokenized without what would change it: normalisation (NFC, lower case), a space put in front, special tokens
recognised in it. The bytes of the tokens are then those of the text, always. What the tokenizer has no token for is a
piece without a token, or with the unknown one.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from distill_cli.errors import ConfigError

SPACE = "\u2581"
"""SentencePiece's mark for a space."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
NO_TOKEN = -1
KINDS = {"merges": "BPE", "unk_id": "Unigram"}
"""Models by a key that only they have."""
Piece = tuple[int, int]
"""A token's id, or NO_TOKEN, and its number of bytes."""


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of byte-level tokenizers stands for (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


ALPHABET = byte_alphabet()


@dataclass(frozen=True)
class ByteVocabulary:
    """The tokens of a tokenizer, by id."""

    token_bytes: list[bytes | None]
    """None for special tokens, the unknown one, and ids without a token."""
    texts: list[str | None]
    """Each token as its tokenizer writes it; None for ids without a token."""
    special: dict[int, str]
    """Special tokens, which stand for no text: their contents by id."""
    added: dict[int, str]
    """Tokens that are found in a text before its model sees it, special or not: their contents by id."""
    is_byte_level: bool
    unknown_id: int | None
    _plain: Tokenizer = field(repr=False)
    """The tokenizer without what changes a text."""

    @classmethod
    def read(cls, folder: Path) -> ByteVocabulary:
        """Read tokenizer.json. Raises ConfigError if there is none, or its tokens cannot be read as bytes."""
        file = folder / "tokenizer.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            kind = _kind(content["model"])
            found = cls._read(content) if kind in ("BPE", "Unigram") else None
        except Exception as error:  # tokenizers raises no narrower type
            what = f"cannot be read as a tokenizer ({type(error).__name__}: {error})"
            fix = "load the model's tokenizer with transformers and save it, which writes that file"
            raise ConfigError(f"{file}: {what}; {fix}") from error
        if found is None:
            what = f"its tokens ({kind}) cannot be read as bytes"
            raise ConfigError(f"{file}: {what}; byte-level and SentencePiece tokenizers can")
        return found

    @classmethod
    def _read(cls, content: dict[str, Any]) -> ByteVocabulary | None:
        """Return None if the alphabet is neither GPT-2's nor SentencePiece's."""
        model, added, vocabulary = content["model"], content["added_tokens"], _vocabulary(content["model"])
        is_byte_level = '"ByteLevel"' in json.dumps([content.get("pre_tokenizer"), content.get("decoder")])
        if not (is_byte_level or any(text.startswith(SPACE) for text in vocabulary)):
            return None
        size = 1 + max([*vocabulary.values(), *(one["id"] for one in added)])
        texts: list[str | None] = [None] * size
        found: list[bytes | None] = [None] * size
        has_bytes = bool(model.get("byte_fallback"))
        for text, number in vocabulary.items():
            texts[number] = text
            found[number] = _from_alphabet(text) if is_byte_level else _from_text(text, has_bytes=has_bytes)
        special = {}
        for one in added:
            texts[one["id"]] = one["content"]
            if one["special"]:
                found[one["id"]] = None
                special[one["id"]] = one["content"]
            elif one["content"] not in vocabulary:
                found[one["id"]] = one["content"].encode()
        unknown = _unknown_id(model, vocabulary)
        if unknown is not None:
            found[unknown] = None
        plain = Tokenizer.from_str(json.dumps(_plain(content, is_byte_level=is_byte_level)))
        plain.encode_special_tokens = True
        contents = {one["id"]: one["content"] for one in added}
        return cls(found, texts, special, contents, is_byte_level, unknown, plain)

    def within(self, num_ids: int) -> ByteVocabulary:
        """Return the tokens that a model of `num_ids` ids has; its tokenizer may have more."""
        special, added = ({n: text for n, text in one.items() if n < num_ids} for one in (self.special, self.added))
        unknown = self.unknown_id if self.unknown_id is not None and self.unknown_id < num_ids else None
        tokens, texts = self.token_bytes[:num_ids], self.texts[:num_ids]
        return ByteVocabulary(tokens, texts, special, added, self.is_byte_level, unknown, self._plain)

    @property
    def size(self) -> int:
        """One above the largest id."""
        return len(self.token_bytes)

    def id_of(self, content: str) -> int | None:
        """Return the id of a token that stands for this text alone, special or not; None if there is none."""
        special = {text: number for number, text in self.special.items()}
        return special.get(content, self._by_bytes.get(content.encode()))

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """Ids by bytes; of several with the same bytes the one that the tokenizer itself would give."""
        ids: dict[bytes, list[int]] = defaultdict(list)
        for number, data in enumerate(self.token_bytes):
            if data:
                ids[data].append(number)
        best = {data: same[0] for data, same in ids.items()}
        for data, same in ids.items():
            pieces = self._tokenize(data.decode(), data) if len(same) > 1 else None
            if pieces and len(pieces) == 1 and pieces[0][0] in same:
                best[data] = pieces[0][0]
        return best

    @cached_property
    def _lengths(self) -> dict[int, list[int]]:
        """The lengths of the tokens that begin with each byte, the longest first."""
        lengths: dict[int, set[int]] = defaultdict(set)
        for data in self._by_bytes:
            lengths[data[0]].add(len(data))
        return {byte: sorted(found, reverse=True) for byte, found in lengths.items()}

    def token_of(self, data: bytes) -> int:
        """Return the token of exactly these bytes; NO_TOKEN if there is none."""
        return self._by_bytes.get(data, NO_TOKEN)

    def first(self, data: bytes) -> int:
        """Return the longest token that bytes begin with; NO_TOKEN if there is none."""
        by_bytes, size = self._by_bytes, len(data)
        for length in self._lengths.get(data[0], ()) if size else ():
            if length <= size and (found := by_bytes.get(data[:length])) is not None:
                return found
        return NO_TOKEN

    def encode(self, data: bytes) -> list[Piece]:
        """Tokenize bytes, valid UTF-8 or not; the lengths add up to theirs."""
        return list(self._pieces(data))

    def is_own_encoding(self, token: int) -> bool:
        """Return whether the tokenizer gives this token for its bytes."""
        data = self.token_bytes[token]
        return data is not None and self.encode(data) == [(token, len(data))]

    def _pieces(self, data: bytes) -> Iterator[Piece]:
        text = data.decode("utf-8", "surrogateescape")
        # Bytes that are no character (surrogates here), and the character that stands for a space.
        apart = "[\udc80-\udcff]+" if self.is_byte_level else f"[\udc80-\udcff{SPACE}]+"
        for run in _runs(apart, text):
            own = run.encode("utf-8", "surrogateescape")
            found = None if re.match(apart, run) else self._tokenize(run, own)
            yield from self._longest(own) if found is None else found

    def _tokenize(self, text: str, data: bytes) -> list[Piece] | None:
        """Return the tokenizer's pieces of a text; None if they do not add up to it."""
        encoding, pieces, place = self._plain.encode(text, add_special_tokens=False), [], 0
        for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            number = number if number < self.size else NO_TOKEN
            own = None if number == NO_TOKEN else self.token_bytes[number]
            length = len(text[begin:end].encode()) if own is None else len(own)
            if length == 0 or (own is not None and data[place : place + length] != own):
                return None
            pieces.append((number, length))
            place += length
        return pieces if place == len(data) else None

    def _longest(self, data: bytes) -> Iterator[Piece]:
        """Cut bytes by the longest token, which needs no text."""
        place = 0
        while place < len(data):
            number = self.first(data[place:])
            length = 1 if number == NO_TOKEN else len(self.token_bytes[number] or b"")
            yield number, length
            place += length


def _kind(model: dict[str, Any]) -> str:
    """Return a model's type, which old files like GPT-2's do not name, and what it has that no bytes stand for."""
    kind = model.get("type") or next((kind for key, kind in KINDS.items() if key in model), "of no known type")
    if affix := model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
        return f"{kind} with {affix!r} in its tokens"
    if kind == "Unigram" and model["unk_id"] is None:  # an error of tokenizers at any unknown character
        return "Unigram without an unknown token"
    return str(kind)


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # unigram: pieces with their scores
        return {text: number for number, (text, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    if "unk_id" in model:
        number: int | None = model["unk_id"]
        return number
    return vocabulary.get(model.get("unk_token") or "")


def _from_alphabet(text: str) -> bytes:
    known = [ALPHABET.get(character) for character in text]
    return text.encode() if None in known else bytes(one for one in known if one is not None)


def _from_text(text: str, *, has_bytes: bool) -> bytes:
    match = BYTE_TOKEN.fullmatch(text) if has_bytes else None
    return bytes([int(match[1], 16)]) if match else text.replace(SPACE, " ").encode()


def _plain(content: dict[str, Any], *, is_byte_level: bool) -> dict[str, Any]:
    """Return a tokenizer's JSON without what changes a text."""
    exact = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    hidden = _hidden(content)
    plain = {
        **content,
        "model": _with_hidden(content["model"], hidden),
        "normalizer": None,
        "pre_tokenizer": _without_prefix(content.get("pre_tokenizer")),
        "post_processor": None,
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {**one, **exact, "content": hidden.get(one["content"], one["content"])} for one in content["added_tokens"]
        ],
    }
    if not is_byte_level:
        plain["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    return plain


def _hidden(content: dict[str, Any]) -> dict[str, str]:
    """Return other names for the special tokens that the model has: with a space, which both alphabets write otherwise.

    Unigram finds them in a text, and BPE finds one of a single character, or that merges make.
    """
    vocabulary = _vocabulary(content["model"])
    special = (one["content"] for one in content["added_tokens"] if one["special"])
    return {text: f" {text}" for text in special if text in vocabulary}


def _with_hidden(model: dict[str, Any], hidden: dict[str, str]) -> dict[str, Any]:
    """Rename tokens of a model."""
    if isinstance(model["vocab"], list):
        vocabulary = [[hidden.get(text, text), score] for text, score in model["vocab"]]
        return {**model, "vocab": vocabulary}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    unknown = model.get("unk_token") or ""
    return {
        **model,
        "vocab": {hidden.get(text, text): number for text, number in model["vocab"].items()},
        "merges": [pair for pair in pairs if hidden.keys().isdisjoint([*pair, "".join(pair)])],
        # One without an id is an error at any unknown character.
        "unk_token": hidden.get(unknown, unknown) if unknown in model["vocab"] else None,
    }


def _without_prefix(part: Any) -> Any:
    """Return a pre-tokenizer that puts no space in front of a text."""
    if isinstance(part, list):
        return [_without_prefix(one) for one in part]
    if not isinstance(part, dict):
        return part
    changed = {key: _without_prefix(value) for key, value in part.items()}
    if part.get("type") == "ByteLevel":
        changed["add_prefix_space"] = False
    if part.get("type") == "Metaspace":
        changed |= {"prepend_scheme": "never"}
        changed.pop("add_prefix_space", None)
    return changed


def _runs(pattern: str, text: str) -> Iterable[str]:
    """Cut a text into what matches a pattern and what is between."""
    return (run for run in re.split(f"({pattern})", text) if run)
