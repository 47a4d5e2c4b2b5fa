"""JSON-lines data: what is read, and the file and line of what cannot be."""

from pathlib import Path

import pytest

from distill_cli.data.registry import load_examples
from distill_cli.data.sources import jsonl
from distill_cli.errors import ConfigError
from distill_cli.types import Example


def write(tmp_path: Path, content: bytes) -> str:
    file = tmp_path / "data.jsonl"
    file.write_bytes(content)
    return str(file)


def test_rows_keep_order_without_blank_lines(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"question": "a", "answer": 7}\n\n{"question": "b\xc3\xa9", "answer": "8"}')
    assert jsonl.load(path=path) == [Example("a", "7", "data"), Example("bé", "8", "data")]


def test_columns_are_chosen_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"problem": "a"}\n')
    assert jsonl.load(path=path, question_key="problem", answer_key=None) == [Example("a", None, "data")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no rows"),
        (b"\n  \n", "the file has no rows"),
        (b'{"question": "a", "answer": 1}\n{"question"\n', ":2: not JSON"),
        (b'{"question": "\xff", "answer": 1}\n', ":1: not UTF-8"),
        (b"[1, 2]\n", ":1: a JSON list"),
        (b'{"question": "a", "answer": 1}\n{"query": "a"}\n', ":2: no column 'question'; this row has: 'query'"),
        (b'{"question": "a"}\n', ":1: no column 'answer'; this row has: 'question'; for prompts without answers"),
        (b'{"question": 3, "answer": 1}\n', ":1: question must be a text"),
        (b'{"question": "a", "answer": {}}\n', ":1: answer must be a text or a number"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        jsonl.load(path=path)
    assert str(caught.value).removeprefix("path=").startswith(path)
    assert message in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            jsonl.load(path=str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "data.train.source: a value is needed"),
        ({"source": "jsonll"}, "did you mean jsonl?"),
        ({"source": "jsonl"}, "data.train.path: a value is needed"),
        ({"source": "jsonl", "path": 3}, "data.train.path=3: must be str"),
        ({"source": "jsonl", "path": "x", "question_kye": "q"}, "did you mean question_key?"),
        ({"source": "nowhere_at_all:load"}, "No module named"),
        ({"source": "json:nothing"}, "no attribute"),
        ({"source": ":"}, "pkg.module:function"),
    ],
)
def test_wrong_source_keys_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_examples(spec, key="data.train")
    assert message in str(caught.value)


def test_user_source_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_source.py").write_text(
        "from distill_cli.types import Example\ndef rows(*, n: int): return [Example(str(i)) for i in range(n)]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert len(load_examples({"source": "my_source:rows", "n": 3}, key="data.train")) == 3
