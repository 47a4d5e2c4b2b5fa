"""Sources: every YAML against a local copy of what is published, columns of one's own, mixtures, streams."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from distill_cli.config.choices import conf_dir
from distill_cli.config.compose import compose
from distill_cli.data.prompts import PromptMaker, make_prompts
from distill_cli.data.registry import load_examples
from distill_cli.data.rows import Stream, boxed_answer, final_answer
from distill_cli.data.sources import instructions
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.ranks.build_source import prompt_settings
from distill_cli.types import Example
from tests.data.published import QUESTION, localize, make_copy

PUBLISHED = [
    f.stem for f in sorted((conf_dir() / "data").glob("*.yaml")) if f.stem not in ("arithmetic", "instructions")
]
OWN_FILES = ("jsonl", "prompts", "table")
NO_EVAL = ["eval.period=0", "eval.at_start=false", "eval.at_end=false"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """`datasets` keeps what it prepares; not where the user's is."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_yaml_loads_published_columns(name: str, tmp_path: Path, tokenizer) -> None:
    argv = [f"data={name}", *NO_EVAL]
    if name in OWN_FILES:
        file = tmp_path / "rows.jsonl"
        file.write_text(json.dumps({"question": QUESTION, "answer": 7}) + "\n")
        argv.append(f"data.train.path={file}")
        argv += [f"data.validation.path={file}"] * (name != "prompts")
    if name == "sources":
        one = "{mine: {source: table, path: openai/gsm8k, name: main, answer_from: final}}"
        argv += [f"data.train.sources={one}", "data.train.weights={mine: 2}", f"data.validation.sources={one}"]
    (job,) = compose(argv)
    config = job.config
    for key in ("train", "validation"):
        spec = getattr(config.data, key)
        if not spec:
            continue
        spec = spec if name in OWN_FILES else localize(spec, tmp_path)
        examples = load_examples(spec, key=f"data.{key}")
        found = SimpleNamespace(config=config, lengths=SimpleNamespace(prompt=500, teacher_prompt=None))
        found.by_teacher = lambda found=found: {"teacher": found}
        make = PromptMaker(tokenizer, prompt_settings(found))
        limit = 12 if isinstance(examples, Stream) else None
        prompts = make_prompts(examples, make, key=key, limit=limit)
        assert QUESTION in tokenizer.decode(prompts[0].token_ids)
        assert all(prompt.example.dataset for prompt in prompts)
        if config.data.verifier is not None:
            assert {prompt.example.answer for prompt in prompts} == {"7"}
        if not isinstance(examples, Stream):
            assert len(prompts) == len(examples) == make.counts["rows"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl", "json", "saved"])
def test_every_file_format_gives_equal_rows(kind: str, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"q": f"a, {i}", "n": i, "why": "because"} for i in range(3)])
    path = tmp_path / f"rows.{kind}"
    if kind == "saved":
        datasets.DatasetDict({"test": rows}).save_to_disk(path)
    elif kind in ("json", "jsonl"):
        rows.to_json(path)
    elif kind == "parquet":
        rows.to_parquet(path)
    else:
        rows.to_csv(path, sep="\t" if kind == "tsv" else ",")
    spec = {"source": "table", "path": str(path), "question_key": "q", "answer_key": "n", "dataset": "d"}
    spec |= {"split": "test"} if kind == "saved" else {}
    examples = load_examples(spec, key="data.train", context="why")
    assert list(examples) == [Example(f"a, {i}", str(i), "d", context="because") for i in range(3)]
    assert examples[2] == list(examples)[2]
    assert len(load_examples({**spec, "limit": 2, "repeat": 3}, key="data.train")) == 6


def test_stream_can_be_read_again(tmp_path: Path, caplog) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{i}", "answer": "1"} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"question": None, "answer": "1"}]))
    spec = {"source": "table", "path": str(file), "streaming": True}
    stream = load_examples(spec, key="data.train")
    assert [e.question for e in stream] == [e.question for e in stream] == ["q0", "q1", "q2", "q3", ""]
    with pytest.raises(ConfigError, match="question_key=problem; there are: question, answer"):
        load_examples({**spec, "question_key": "problem"}, key="data.train")


def test_bad_line_costs_one_row(tmp_path: Path, caplog) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(
        b'{"question": "a", "answer": 1}\n\n{"question": "caf\xe9"}\n{"question"\n{"question": "b", "answer": 2}\n'
    )
    stream = load_examples({"source": "table", "path": str(file), "streaming": True, "repeat": 2}, key="data.train")
    assert [e.question for e in stream] == ["a", "a", "", "", "", "", "b", "b"]
    assert f"{file}:3: not UTF-8" in caplog.text
    assert f"{file}:4: not JSON" in caplog.text
    limited = load_examples({"source": "table", "path": str(file), "streaming": True, "limit": 1}, key="data.train")
    assert len(list(limited)) == 1
    file.write_bytes(b"\n")
    with pytest.raises(ConfigError, match="has no rows"):
        load_examples({"source": "table", "path": str(file), "streaming": True}, key="data.train")


def test_broken_stream_names_the_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    rows = "".join(f"question {i} {'x' * 1000},{i}\n" for i in range(30_000))
    file.write_bytes(b"question,answer\n" + rows.encode() + b"caf\xe9,1\n")
    stream = load_examples({"source": "table", "path": str(file), "streaming": True}, key="data.train")
    with pytest.raises(ConfigError, match=r"rows.csv \(train\), after row \d+: UnicodeDecodeError"):
        list(stream)


def test_errors_are_printed_once(tmp_path: Path, capfd) -> None:
    """`datasets` has a logger of its own, which says it before."""
    pytest.importorskip("datasets").utils.logging.get_logger("datasets.packaged_modules.csv.csv")
    (tmp_path / "a.csv").write_bytes(b"question\n\xff\n")
    with pytest.raises(ConfigError):
        load_examples({"source": "table", "path": str(tmp_path / "a.csv"), "answer_key": None}, key="data.train")
    assert capfd.readouterr().err == ""


def test_files_with_other_columns_are_named(tmp_path: Path) -> None:
    import datasets

    for name, column in (("a", "question"), ("b", "problem")):
        datasets.Dataset.from_list([{column: "x", "answer": "1"}]).to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ConfigError, match=r"its files have other columns \(question, answer\) and \(problem, answer\)"):
        load_examples({"source": "table", "path": str(tmp_path)}, key="data.train")


def test_weighted_mixture_loses_no_row(tmp_path: Path) -> None:
    sources = {
        name: {"source": "arithmetic", "split": "train", "size": size, "seed": seed}
        for seed, (name, size) in enumerate({"a": 6, "b": 30}.items())
    }
    rows = load_examples({"source": "mix", "sources": sources}, key="data.train")
    assert Counter(e.dataset for e in rows) == {"a": 6, "b": 30}
    rows = load_examples({"source": "mix", "sources": sources, "weights": {"a": 1, "b": 2}}, key="data.train")
    assert Counter(e.dataset for e in rows) == {"a": 15, "b": 30}
    assert len({e.question for e in rows if e.dataset == "a"}) == 6
    assert [rows[i] for i in range(len(rows))] == list(rows)
    for weights in ({"a": 1}, {"a": 1, "b": 0}, {"a": 1, "b": "x"}):
        with pytest.raises(ConfigError, match=r"data.train.weights"):
            load_examples({"source": "mix", "sources": sources, "weights": weights}, key="data.train")
    with pytest.raises(ConfigError, match=r"data.train.weights.b=1e-09: .* 30,000,000,030 rows"):
        load_examples({"source": "mix", "sources": sources, "weights": {"a": 1, "b": 1e-9}}, key="data.train")
    with pytest.raises(ConfigError, match=r"data.train.sources.a.size: a value is needed"):
        load_examples({"source": "mix", "sources": {"a": {"source": "arithmetic"}}}, key="data.train")


def test_streams_are_mixed_by_weight(tmp_path: Path) -> None:
    copy = make_copy("nvidia/OpenMathInstruct-2", tmp_path)
    stream = {"source": "table", "path": str(copy), "question_key": "problem", "answer_key": None, "streaming": True}
    few = {"source": "arithmetic", "split": "train", "size": 3, "seed": 0}
    spec = {"source": "mix", "sources": {"s": stream, "few": few}, "weights": {"s": 3, "few": 1}}
    mixed = load_examples(spec, key="data.train")
    first, again = ([e for e, _ in zip(mixed, range(400), strict=False)] for _ in range(2))
    assert first == again
    assert 250 < Counter(e.dataset for e in first)["s"] < 350
    with pytest.raises(ConfigError, match="weights: needed for streamed"):
        load_examples({**spec, "weights": None}, key="data.train")


def test_conversations_end_with_a_user_message(tmp_path: Path) -> None:
    turns = ["system", "user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(turns)]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:1]}) + "\n")
    spec = {"source": "table", "path": str(file), "messages_key": "messages", "answer_key": None}
    example, without_user = load_examples(spec, key="data.train")
    assert example.question == "user 3"
    assert [m["role"] for m in example.messages] == turns[:4]
    assert example.response == "assistant 4"
    assert without_user.question == ""


@pytest.mark.parametrize(
    ("content", "keys", "message"),
    [
        ("{'question': 'a'}", {}, "rows.jsonl:1: not JSON"),
        ('{"query": "a", "answer": 1}', {}, "no column 'question'; this row has: 'query', 'answer'"),
        ('{"question": "a"}', {"answer_key": "x.y"}, "no column 'x.y'"),
        ('{"question": "a"}', {"answer_key": "question.y"}, "no column 'question.y'; this row has: 'question'"),
        ('{"question": ["a"], "answer": 1}', {}, "question must be a text, not list"),
        ('{"question": "a", "answer": 1}\n{"question": 2, "answer": 1}', {}, "rows.jsonl:2: question must be a text"),
        ('{"messages": "hello"}', {"messages_key": "messages", "answer_key": None}, "must be a list of messages"),
        (
            '{"messages": [{"role": "me"}]}',
            {"messages_key": "messages", "answer_key": None},
            "each message needs a role",
        ),
        ('{"question": "a", "answer": 1}', {"answer_from": "there"}, "data.train.answer_from=there: must be one of"),
        ('{"question": "a", "answer": 1}', {"repeat": 0}, "data.train.repeat=0: must be at least 1"),
    ],
)
def test_wrong_file_names_the_place(content: str, keys: dict, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content + "\n")
    with pytest.raises(ConfigError) as caught:
        load_examples({"source": "table", "path": str(file), **keys}, key="data.train")
    assert message in str(caught.value)


def test_wrong_table_names_its_columns(tmp_path: Path) -> None:
    copy = make_copy("openai/gsm8k", tmp_path)
    spec = {"source": "table", "path": str(copy), "name": "main"}
    with pytest.raises(ConfigError, match=r"no such column: question_key=problem; there are: question, answer"):
        load_examples({**spec, "question_key": "problem"}, key="data.train")
    with pytest.raises(ConfigError, match=r"data.train.path=.*split"):
        load_examples({**spec, "split": "dev"}, key="data.train")
    with pytest.raises(ConfigError, match=r"data.train.path=/no/such: no such file or folder"):
        load_examples({"source": "table", "path": "/no/such"}, key="data.train")
    for name, content in {
        "a.parquet": b"no parquet",
        "b.csv": b"",
        "c.xml": b"x",
        "d.csv": b"question\n\xff\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=r"data.train.path="):
            load_examples({"source": "table", "path": str(tmp_path / name), "answer_key": None}, key="data.train")


def test_answers_are_found_in_solutions() -> None:
    assert final_answer("2 x 700 = <<2*700=1400>>1,400\n#### 1,400") == "1400"
    assert final_answer("42") is None
    assert boxed_answer(r"so \boxed{1}, no: \boxed{\frac{1}{2}} it is") == r"\frac{1}{2}"
    assert boxed_answer(r"\boxed{(0, 1]") == "(0, 1]"
    assert boxed_answer("42") is None


def test_source_alone_names_its_group() -> None:
    (job,) = compose(["data.train.source=jsonl", "data.train.path=x.jsonl"])
    with pytest.raises(ConfigError) as caught:
        load_examples(job.config.data.train, key="data.train")
    assert (
        "data.train.source=jsonl: keys of another source are still there; choose data=jsonl"
        in caught.value.problems[-1]
    )


@pytest.mark.parametrize("column", ["prompt", "question", "instruction", "problem", "query", "input", "text"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_prompts_column_is_found(column: str, suffix: str, tmp_path: Path) -> None:
    import pandas

    rows, file = pandas.DataFrame([{"id": 1, column: "a"}, {"id": 2, column: "b"}]), tmp_path / f"p.{suffix}"
    write = {"jsonl": lambda at: rows.to_json(at, orient="records", lines=True), "csv": rows.to_csv}
    write.get(suffix, rows.to_parquet)(file)
    for streaming in (False, True):
        spec = {"source": "table", "path": str(file), "question_key": None, "answer_key": None, "streaming": streaming}
        assert [(one.question, one.answer) for one in load_examples(spec, key="data.train")] == [
            ("a", None),
            ("b", None),
        ]


def test_text_and_conversations_are_found(tmp_path: Path) -> None:
    spec = {"source": "table", "question_key": None, "answer_key": None}
    (tmp_path / "p.txt").write_text("What is 1 + 1?\nWhy?\n")
    found = load_examples({**spec, "path": str(tmp_path / "p.txt")}, key="data.train")
    assert [one.question for one in found] == ["What is 1 + 1?", "Why?"]
    (tmp_path / "c.jsonl").write_text(json.dumps({"input": [{"role": "user", "content": "Hello"}], "id": 3}))
    (found,) = load_examples({**spec, "path": str(tmp_path / "c.jsonl")}, key="data.train")
    assert found.question == "Hello"


def test_missing_prompts_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": 1, "label": "x"}')
    spec = {"source": "table", "path": str(tmp_path / "p.jsonl"), "question_key": None, "answer_key": None}
    with pytest.raises(ConfigError, match="no column of prompts; there are: id, label; give question_key"):
        load_examples(spec, key="data.train")


def test_instructions_share_no_topic() -> None:
    of_split = {split: instructions.load(split=split, size=500) for split in ("train", "validation")}
    assert instructions.load(split="train", size=20) == of_split["train"][:20]
    topics = {topic for names in instructions.TOPICS.values() for topic in names.split(", ")}
    found = {
        split: {topic for topic in topics for row in rows if f" {topic} " in f" {row.question.rstrip('.?')} "}
        for split, rows in of_split.items()
    }
    assert found["train"]
    assert found["validation"]
    assert not found["train"] & found["validation"]
    with pytest.raises(ConfigError, match="size=100000: must be between 1 and"):
        instructions.load(split="train", size=100_000)
