"""Small tokenizers made on the spot."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from distill_cli.tokens.byte_vocabulary import ByteVocabulary
from distill_cli.tokens.token_map import Ends, TokenMap

END = "<end>"


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a tokenizer into a folder like a model's."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_level(folder: Path, merges: Sequence[tuple[str, str]], *, letters: str = "ab", end: str = END) -> Path:
    """Byte-level BPE of a few letters."""
    texts = [*letters, *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={text: number for number, text in enumerate(texts)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    return write(tokenizer, folder)


def permuted(source: Path, folder: Path, *, shift: int = 7) -> tuple[Path, list[int]]:
    """Copy a tokenizer with other ids; return its folder, and the new id of each old one."""
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    size = 1 + max([*vocabulary.values(), *(one["id"] for one in content["added_tokens"])])
    new_id = [(number * shift + 3) % size for number in range(size)]
    assert len({*new_id}) == size
    content["model"]["vocab"] = {text: new_id[number] for text, number in vocabulary.items()}
    for one in content["added_tokens"]:
        one["id"] = new_id[one["id"]]
    content["added_tokens"].sort(key=lambda one: one["id"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder, new_id


def map_of(student: Path, teacher: Path, *, end: str = END) -> TokenMap:
    """Map a teacher's tokens to a student's; both end with the token `end`."""
    vocabularies = ByteVocabulary.read(student), ByteVocabulary.read(teacher)
    ends = [next(number for number, text in one.special.items() if text == end) for one in vocabularies]
    return TokenMap(*vocabularies, ends=Ends(*([one] for one in ends)), teacher_ids=vocabularies[1].size)
