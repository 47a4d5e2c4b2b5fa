"""Tokens of any bytes, in ten kinds of tokenizers: two of the repository's, and eight trained here on its texts."""

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distill_cli.errors import ConfigError
from distill_cli.tokens.align import LEFT_OUT, align
from distill_cli.tokens.byte_vocabulary import NO_TOKEN, SPACE, ByteVocabulary
from distill_cli.tokens.token_map import Ends, TokenMap
from tests.tokens.vocabularies import byte_level, write

ROOT = Path(__file__).parents[2]
TINY = ROOT / "distill_cli" / "assets" / "tiny_pair"
FRAGMENTS = (
    *("don't", "we'll", "I'M", " the", "The", "12345", "3.14", "x_1", "def f(x):\n    return x**2\n", "$\\frac{1}{2}$"),
    *("<|endoftext|>", "</s>", "<s>", "<unk>", "<pad>", "<eos>", "<0x41>", "<0xE2>", "<think>", "<|im_end|>"),
    *("<|endof", "text|>", "\n\n", "▁", "▁▁the", "Ġ", "Ċ", "e\u0301", "é", "Å", "ﬁ", "①", "ß", "İ", "ǆ"),
    *("नि", "한국어", "\u1112\u1161\u11ab", "漢字かな", "שלום", "مرحبا", "\u202eabc\u202c", "ไทย", "\ufeff", "\ufffd"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "\U0001f44d\U0001f3fd", "🇩🇪"),
    *("\u0301\u0302", "\u200d", "\xa0", "\u3000", "\u2028", "\x85", "\0", "\x7f", "\U0010ffff"),
)
"""Contractions, code, contents of special tokens, marks of the alphabets, non-NFC, scripts, ZWJ, control characters."""
BLOCKS = (range(0x80), range(0x80, 0x300), range(0x300, 0x3100), range(0x3100, 0xD800), range(0xE000, 0x10000))
PLANES = (range(0x1F300, 0x1FB00), range(0x10000, 0x110000))
GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA_3.replace("{1,3}", "")
CONTROL = ("<unk>", "<s>", "</s>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def training_text() -> list[str]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("LICENSE", "README.md")]
    return [line for text in texts for line in text.splitlines(keepends=True)] + list(FRAGMENTS) * 20


def ascii_text() -> list[str]:
    return [line.encode("ascii", "ignore").decode() for line in training_text()]


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change a tokenizer's JSON."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return folder


def byte_level_bpe(*steps: Any, all_bytes: bool = True, special: Sequence[str] = (), **options: Any) -> Tokenizer:
    """Train byte-level BPE."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_text() if all_bytes else ascii_text(), trainer)
    return tokenizer


def split(pattern: str) -> tuple[Any, Any]:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def gpt_2(folder: Path) -> Path:
    """With a space in front of a text, and a file as old as GPT-2's: no type of the model, and merges as texts."""
    tokenizer = byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), special=["<|endoftext|>"])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)

    def age(content: dict[str, Any]) -> None:
        del content["model"]["type"]
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]

    return edit(write(tokenizer, folder), age)


def llama_3(folder: Path) -> Path:
    """Some words of the vocabulary that no merges lead to."""
    tokenizer = byte_level_bpe(*split(LLAMA_3), ignore_merges=True)
    begin = "<|begin_of_text|>"
    tokenizer.add_special_tokens([begin, "<|endoftext|>"])
    added = [(begin, tokenizer.token_to_id(begin))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=added)

    def drop_merges(content: dict[str, Any]) -> None:
        del content["model"]["merges"][::3]

    return edit(write(tokenizer, folder), drop_merges)


def qwen(folder: Path) -> Path:
    """NFC, and added tokens that are text."""
    tokenizer = byte_level_bpe(*split(QWEN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    return write(tokenizer, folder)


def few_bytes(folder: Path) -> Path:
    """Only the bytes of ASCII texts."""
    return write(byte_level_bpe(*split(GPT_2), all_bytes=False, special=["<|endoftext|>", "</s>"]), folder)


def sentencepiece_bpe(special: Sequence[str]) -> Tokenizer:
    """Train BPE of SentencePiece's alphabet, whose tokens for bytes are no added ones."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[*special, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(training_text(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def keep_added(content: dict[str, Any], special: Sequence[str]) -> None:
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] in special]


def llama_2(folder: Path) -> Path:
    tokenizer = sentencepiece_bpe(CONTROL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])

    def change(content: dict[str, Any]) -> None:
        keep_added(content, CONTROL)
        content["pre_tokenizer"] = None

    return edit(write(tokenizer, folder), change)


def gemma(folder: Path) -> Path:
    """Its added tokens are runs of spaces too, which merges lead to."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    tokenizer = sentencepiece_bpe(special)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")

    def change(content: dict[str, Any]) -> None:
        keep_added(content, special)
        vocabulary = content["model"]["vocab"]
        texts = (SPACE * 2, "\n\n")
        content["model"]["merges"] += [[text[0]] * 2 for text in texts if text not in vocabulary]
        for text in texts:
            number = vocabulary.setdefault(text, len(vocabulary))
            content["added_tokens"].append(
                {**content["added_tokens"][0], "id": number, "content": text, "special": False}
            )

    return edit(write(tokenizer, folder), change)


def unigram(text: Sequence[str], special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def unigram_bytes(folder: Path) -> Path:
    def change(content: dict[str, Any]) -> None:
        model = content["model"]
        model["vocab"][len(CONTROL) : len(CONTROL)] = [[text, 0.0] for text in BYTES]
        model["byte_fallback"] = True

    return edit(write(unigram(training_text(), CONTROL), folder), change)


def t5(folder: Path) -> Path:
    """No tokens for bytes; lower case and compatibility forms; an end after each text."""
    tokenizer = unigram(ascii_text(), ("<pad>", "</s>", "<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<extra_id_0>"])
    return write(tokenizer, folder)


MADE = (gpt_2, llama_3, qwen, few_bytes, llama_2, gemma, unigram_bytes, t5)
NAMES = ("teacher", "other_teacher", *(one.__name__ for one in MADE))
PREPENDS = ("gpt_2", "llama_2", "unigram_bytes", "t5")
"""Tokenizers that put a space in front of a text."""
PAIRS = (
    ("teacher", "other_teacher"),
    ("teacher", "gemma"),
    ("llama_2", "llama_3"),
    ("qwen", "few_bytes"),
    ("gpt_2", "t5"),
    ("t5", "unigram_bytes"),
    ("unigram_bytes", "llama_2"),
)
"""Students and their teachers."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {make.__name__: make(tmp_path_factory.mktemp(make.__name__)) for make in MADE}
    return {"teacher": TINY / "teacher", "other_teacher": TINY / "other_teacher"} | made


@pytest.fixture(scope="module")
def vocabularies(folders: Mapping[str, Path]) -> dict[str, ByteVocabulary]:
    return {name: ByteVocabulary.read(folder) for name, folder in folders.items()}


def random_part(rng: random.Random) -> str:
    match rng.randrange(6):
        case 0 | 1:
            return rng.choice(FRAGMENTS)
        case 2:
            return "".join(map(chr, rng.choices(rng.choice(BLOCKS), k=rng.randint(1, 5))))
        case 3:
            return chr(rng.choice(rng.choice(PLANES)))
        case 4:
            return "".join(rng.choices(" \t\n\r", weights=(6, 2, 2, 1), k=rng.randint(1, 6)))
        case _:
            return " " * rng.randrange(2) + "".join(rng.choices("aeinstAT0189.,<>/|'", k=rng.randint(1, 8)))


def random_texts(seed: str, number: int) -> Iterator[bytes]:
    """Yield texts, of which every fourth has bytes that are no UTF-8, or part of a character."""
    rng = random.Random(seed)
    for index in range(number):
        data = "".join(random_part(rng) for _ in range(rng.randrange(8))).encode()
        if index % 4 == 3:
            begin, end = sorted(rng.choices(range(len(data) + 1), k=2))
            data = data[:begin] + rng.randbytes(rng.randrange(4)) + data[end:]
        yield data


def bytes_of(vocabulary: ByteVocabulary, token: int) -> bytes | None:
    return None if token == NO_TOKEN else vocabulary.token_bytes[token]


def assert_whole(vocabulary: ByteVocabulary, data: bytes) -> None:
    place = 0
    for token, length in vocabulary.encode(data):
        own = bytes_of(vocabulary, token)
        assert length > 0, data
        assert own == data[place : place + length] or (own is None and token in (NO_TOKEN, vocabulary.unknown_id)), data
        place += length
    assert place == len(data), data


def map_between(student: ByteVocabulary, teacher: ByteVocabulary) -> TokenMap:
    ends = Ends([max(student.special)], [max(teacher.special)])
    return TokenMap(student, teacher, ends=ends, teacher_ids=teacher.size)


def has_all_bytes(vocabulary: ByteVocabulary) -> bool:
    return all(vocabulary.token_of(bytes([byte])) != NO_TOKEN for byte in range(256))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_stay_whole(vocabularies: Mapping[str, ByteVocabulary], name: str) -> None:
    for data in random_texts(name, 5000):
        assert_whole(vocabularies[name], data)


@pytest.mark.parametrize("name", NAMES)
def test_all_bytes_have_tokens(vocabularies: Mapping[str, ByteVocabulary], name: str) -> None:
    """What these tokenizers know is never left without a token, if need be one for each byte."""
    vocabulary = vocabularies[name]
    assert has_all_bytes(vocabulary) == (name not in ("few_bytes", "t5"))
    if has_all_bytes(vocabulary):
        for data in random_texts(name, 300):
            assert all(bytes_of(vocabulary, token) for token, _ in vocabulary.encode(data))


def answers_of(student: ByteVocabulary, number: int) -> Iterator[list[int]]:
    """Yield answers as the student's tokenizer writes them, and such of any tokens; all with an end."""
    rng = random.Random(number)
    texts = [token for token, data in enumerate(student.token_bytes) if data]
    for index, data in enumerate(random_texts("answers", number)):
        own = [token for token, _ in student.encode(data) if token != NO_TOKEN]
        yield [*(own if index % 3 else rng.choices(texts, k=8)), max(student.special)]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_alignment_finds_every_token(vocabularies: Mapping[str, ByteVocabulary], student: str, teacher: str) -> None:
    tokens = map_between(vocabularies[student], vocabularies[teacher])
    is_complete = has_all_bytes(tokens.teacher)
    number_found = 0
    for answer in answers_of(tokens.student, 300):
        alignment = align(answer, tokens)
        theirs = [bytes_of(tokens.teacher, u) or b"" for u in alignment.teacher_ids]
        begins = list(accumulate(map(len, theirs), initial=0))
        is_whole, end = True, 0
        for token, place in zip(answer, alignment.places_R4.tolist(), strict=True):
            data = tokens.student.token_bytes[token] or b""
            begin, end = end, end + len(data)
            if tuple(place) == LEFT_OUT:
                is_whole = False
                assert not (data and is_complete)
                continue
            first, offset, last, until = place
            if not data:
                assert tokens.special_of_student[token] == alignment.teacher_ids[first]
                assert place == [first, 0, first, 0]
                continue
            assert 0 <= offset < len(theirs[first])
            assert 0 < until <= len(theirs[last])
            assert b"".join(theirs[first : last + 1])[offset : begins[last] + until - begins[first]] == data
            if is_whole:
                assert (begins[first] + offset, begins[last] + until) == (begin, end)
            number_found += 1
        if is_whole:
            assert b"".join(theirs) == b"".join(tokens.student.token_bytes[token] or b"" for token in answer)
    assert number_found > 1000


@pytest.mark.parametrize("name", NAMES)
def test_encodes_as_its_tokenizer(
    folders: Mapping[str, Path], vocabularies: Mapping[str, ByteVocabulary], name: str
) -> None:
    """Of a text that normalisation leaves alone, with the space that some put in front."""
    tokenizer = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    for text in ascii_text()[:200]:  # the license
        text = text.strip().lower().replace("  ", " ").replace("\t", " ")
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        found = vocabularies[name].encode((" " * (name in PREPENDS and text != "") + text).encode())
        assert [token for token, _ in found] == expected, text


@pytest.mark.parametrize("name", NAMES)
def test_normalisation_changes_no_bytes(
    folders: Mapping[str, Path], vocabularies: Mapping[str, ByteVocabulary], name: str
) -> None:
    texts = ("Cafe\u0301", "ﬁne ① Å", "THE END", "  two", " one", "none", "\u1112\u1161\u11ab", "a\u200db\x85")
    normalizer = Tokenizer.from_file(str(folders[name] / "tokenizer.json")).normalizer
    assert normalizer is None or any(normalizer.normalize_str(text) != text for text in texts)
    for text in texts:
        assert_whole(vocabularies[name], text.encode())


@pytest.mark.parametrize("name", NAMES)
def test_a_beginning_changes_nothing_else(vocabularies: Mapping[str, ByteVocabulary], name: str) -> None:
    """What normalisation changes, or needs a space in front, leaves the tokens of other words alone."""
    vocabulary = vocabularies[name]
    for line in ascii_text()[:200]:
        rest = "".join(f" {word}" for word in line.split() if word.isalpha()).encode()
        for first in ("the", "THE", "Cafe\u0301", "ﬁne", "a▁b"):
            if first.isascii() or name != "few_bytes":
                own = first.encode()
                assert vocabulary.encode(own + rest) == vocabulary.encode(own) + vocabulary.encode(rest), (first, rest)


@pytest.mark.parametrize("name", NAMES)
def test_special_contents_are_plain_text(vocabularies: Mapping[str, ByteVocabulary], name: str) -> None:
    vocabulary = vocabularies[name]
    for content in vocabulary.special.values():
        for text in (content, f"so {content}\n", content * 2):
            tokens = [token for token, _ in vocabulary.encode(text.encode())]
            assert vocabulary.special.keys().isdisjoint(tokens), text
            assert len(tokens) > text.count(content)
            assert_whole(vocabulary, text.encode())


def test_special_letters_have_no_token(tmp_path: Path) -> None:
    """One special token is what merges lead to, another a letter."""
    folder = byte_level(tmp_path, [("a", "a"), ("aa", "a")], end="aaa")
    b = {"id": 1, "content": "b"}
    edit(folder, lambda content: content["added_tokens"].append({**content["added_tokens"][0], **b}))
    vocabulary = ByteVocabulary.read(folder)
    assert vocabulary.special == {3: "aaa", 1: "b"}
    assert vocabulary.encode(b"aaa") == [(2, 2), (0, 1)]
    assert vocabulary.encode(b"ab") == [(0, 1), (NO_TOKEN, 1)]


def test_added_text_is_one_token(vocabularies: Mapping[str, ByteVocabulary]) -> None:
    think = vocabularies["qwen"].id_of("<think>")
    assert think is not None
    assert vocabularies["qwen"].encode(b"<think>a")[0] == (think, len("<think>"))


def test_added_spaces_are_spaces(vocabularies: Mapping[str, ByteVocabulary]) -> None:
    gemma = vocabularies["gemma"]
    spaces = gemma.texts.index(SPACE * 2)
    assert gemma.token_bytes[spaces] == b"  "
    assert gemma.encode(b"  ") == [(spaces, 2)]
    assert gemma.encode((SPACE * 2).encode()) != [(spaces, 6)]


@pytest.mark.parametrize("name", ["llama_2", "gemma", "unigram_bytes"])
def test_byte_tokens_are_letters(vocabularies: Mapping[str, ByteVocabulary], name: str) -> None:
    """A letter's token and that of its byte read alike; the tokenizer itself gives the letter's."""
    theirs = vocabularies[name]
    letter, byte = (theirs.texts.index(text) for text in ("A", "<0x41>"))
    assert theirs.token_bytes[letter] == theirs.token_bytes[byte] == b"A"
    assert theirs.token_of(b"A") == letter
    ours = vocabularies["llama_3"]
    assert map_between(ours, theirs).first[[letter, byte]].tolist() == [ours.token_of(b"A")] * 2
    same = map_between(theirs, theirs).first
    assert same[[letter, byte]].tolist() == [letter, byte]


def test_unknown_characters_are_one_piece(vocabularies: Mapping[str, ByteVocabulary]) -> None:
    t5, bytes_too = vocabularies["t5"], vocabularies["unigram_bytes"]
    assert t5.unknown_id == t5.texts.index("<unk>")
    text = "the 語🙂 end"
    pieces = t5.encode(text.encode())
    assert (t5.unknown_id, len("語🙂".encode())) in pieces
    assert bytes_too.unknown_id not in [token for token, _ in bytes_too.encode(text.encode())]


def test_missing_bytes_have_no_token(vocabularies: Mapping[str, ByteVocabulary]) -> None:
    pieces = vocabularies["few_bytes"].encode("a\U0010ffff".encode())
    assert pieces[1:] == [(NO_TOKEN, 1)] * 4


def test_equal_bytes_without_their_letters(tmp_path: Path) -> None:
    """Two tokens of the same bytes, which the tokenizer gives for no text."""
    folder = byte_level(tmp_path, [])

    def change(content: dict[str, Any]) -> None:
        content["model"]["vocab"] |= {"漢": 3, "æ¼¢": 4}

    vocabulary = ByteVocabulary.read(edit(folder, change))
    assert vocabulary.encode("a漢".encode()) == [(0, 1), (3, 3)]


def test_an_unknown_token_without_an_id(tmp_path: Path) -> None:
    folder = edit(byte_level(tmp_path, []), lambda content: content["model"].update(unk_token="<unk>"))
    assert ByteVocabulary.read(folder).encode(b"ac") == [(0, 1), (NO_TOKEN, 1)]


def word_piece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))


def clip() -> Tokenizer:
    vocabulary = {"a": 0, "b": 1, "b</w>": 2, "ab</w>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b</w>")], end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


def words() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>"))


def plain_letters() -> Tokenizer:
    return Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))


def without_unknown() -> Tokenizer:
    return Tokenizer(models.Unigram([(SPACE, -1.0), ("a", -2.0)]))


@pytest.mark.parametrize("make", [word_piece, clip, words, plain_letters, without_unknown])
def test_other_kinds_are_an_error(tmp_path: Path, make: Callable[[], Tokenizer]) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: its tokens \(.+\) cannot be read as bytes; byte-level"):
        ByteVocabulary.read(write(make(), tmp_path))


DAMAGED = {
    "cut off": '{"model": {"type": "BPE", "vo',
    "empty": "",
    "a list": "[]",
    "no model": '{"added_tokens": []}',
    "no vocabulary": '{"added_tokens": [], "model": {"type": "BPE", "merges": []}}',
    "an empty vocabulary": '{"added_tokens": [], "model": {"type": "Unigram", "unk_id": 0, "vocab": []}}',
    "a merge without its token": json.dumps(
        {
            "added_tokens": [],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]},
        }
    ),
    "an added token without an id": json.dumps(
        {"added_tokens": [{"content": "a"}], "model": {"type": "BPE", "vocab": {SPACE: 0}, "merges": []}}
    ),
}


@pytest.mark.parametrize("kind", ["missing", *DAMAGED])
def test_damaged_files_are_an_error(tmp_path: Path, kind: str) -> None:
    if kind in DAMAGED:
        (tmp_path / "tokenizer.json").write_text(DAMAGED[kind], encoding="utf-8")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: .*cannot be read.*;"):
        ByteVocabulary.read(tmp_path)
