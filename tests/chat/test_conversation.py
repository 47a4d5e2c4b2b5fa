"""A conversation with the shipped student's tokenizer: what the model reads, and what is saved."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from distill_cli.chat.conversation import Conversation, TextStream, Turn, save
from distill_cli.data.prompts import PromptMaker, PromptSettings, load_tokenizer
from distill_cli.data.sources import jsonl, table
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.types import Sample

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[-1].content }}"
)


def conversation(*, context: int = 512, template: str | None = "its own", prompt: str = "{question}") -> Conversation:
    tokenizer = load_tokenizer(ASSETS / "tiny_pair/student")
    if template != "its own":
        tokenizer.chat_template = template
    make = PromptMaker(tokenizer, PromptSettings(context, prompt, teachers=()))
    return Conversation(make, context, "raise engine.student.max_model_len")


def say(talk: Conversation, question: str, answer: str) -> str:
    """Ask, answer, and return what the model read."""
    rendered = talk.render(question)
    talk.turns.append(Turn(rendered, Sample([5], [0.0], "stop"), answer))
    return talk.make.tokenizer.decode(rendered.prompt_ids)


def test_a_turn_reads_those_before() -> None:
    talk = conversation(prompt="Q: {question}")
    talk.system = "Be brief."
    assert say(talk, "3 + 4", "7").count("<|im_start|>") == 3
    second = say(talk, "5 + 5", "10")
    assert "system\nBe brief." in second
    assert "user\nQ: 3 + 4<|im_end|>\n<|im_start|>assistant\n7<|im_end|>" in second
    assert second.endswith("user\nQ: 5 + 5<|im_end|>\n<|im_start|>assistant\n")


def test_without_template_lines_are_independent() -> None:
    talk = conversation(template=None, prompt="Problem: {question}\nSolution:")
    assert not talk.has_template
    assert say(talk, "3 + 4", " 7") == "Problem: 3 + 4\nSolution:"
    assert say(talk, "5 + 5", " 10") == "Problem: 5 + 5\nSolution:"


def test_a_full_context_is_refused() -> None:
    talk = conversation(context=40)
    say(talk, "3 + 4", "7")
    with pytest.raises(
        ConfigError, match=r"has \d+ tokens with this message, and the context 40: nothing was cut.*/reset"
    ):
        talk.render("What is 123456 + 123456 - 123456 + 123456?")
    assert len(talk.turns) == 1
    talk.turns.clear()
    with pytest.raises(ConfigError, match="shorten it, or raise engine.student.max_model_len"):
        talk.render("1 + 2 + " * 30)


def test_a_failing_template_says_why() -> None:
    talk = conversation(template=NO_SYSTEM)
    assert talk.render("3 + 4").prompt_ids
    talk.system = "Be brief."
    with pytest.raises(
        ConfigError, match="template fails: TemplateError: no system; begin anew .*without a system prompt"
    ):
        talk.render("3 + 4")


def test_a_saved_conversation_is_data(tmp_path: Path) -> None:
    talk = conversation()
    say(talk, "3 + 4", "7")
    say(talk, "Why?", "ünïcode\n\x1b")
    file = tmp_path / "chat.jsonl"
    save(file, talk.rows("student"))
    assert [json.loads(line)["model"] for line in file.read_text().splitlines()] == ["student"] * 2
    rows = jsonl.load(path=str(file), response_key="answer")
    assert [(row.question, row.answer, row.response) for row in rows] == [
        ("3 + 4", "7", "7"),
        (
            "Why?",
            "ünïcode\n\x1b",
        )
        * 1
        + ("ünïcode\n\x1b",),
    ]
    _, second = table.load(path=str(file), messages_key="messages", answer_key=None)
    assert [message["content"] for message in second.messages] == ["3 + 4", "7", "Why?"]
    assert second.response == "ünïcode\n\x1b"
    with pytest.raises(ConfigError, match="exists already; give another name"):
        save(file, talk.rows("student"))
    with pytest.raises(ConfigError, match="cannot be written"):
        save(tmp_path / "none" / "chat.jsonl", talk.rows("student"))
    with pytest.raises(ConfigError, match="nothing was answered yet"):
        save(tmp_path / "other.jsonl", [])


def test_characters_are_shown_whole() -> None:
    tokenizer = conversation().make.tokenizer
    text = "7 + 🙂 = naïve 日本\n####  x"
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer.decode)
    parts = [stream.add([token]) for token in ids[:-1]] + [stream.add(ids[-1:], is_last=True)]
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 8


def test_broken_characters_do_not_wait_forever() -> None:
    tokenizer = conversation().make.tokenizer
    (half, *_) = tokenizer.encode("🙂", add_special_tokens=False)
    stream = TextStream(tokenizer.decode)
    shown = "".join(stream.add([half]) for _ in range(50))
    assert len(shown) > 30
    assert {*shown} == {"\ufffd"}


def test_a_turn_keeps_what_was_asked() -> None:
    talk = conversation()
    say(talk, "3 + 4", "7")
    turn = replace(talk.turns[0])
    say(talk, "5 + 5", "10")
    assert talk.turns[0] == turn
