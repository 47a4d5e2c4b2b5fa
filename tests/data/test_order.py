"""The order of prompts: fixed, resumable at any step, without loss or repetition; and prompts that are not taken."""

from __future__ import annotations

import itertools
import threading
from collections import Counter

import pytest
from transformers import AutoTokenizer

from distill_cli.data.order import PromptOrder, PromptStream, shuffled
from distill_cli.data.prompts import PromptMaker, PromptSettings, TeacherPromptSettings, make_prompts
from distill_cli.data.rows import Stream
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.types import Example, Prompt, Target

ROWS = [Example(f"q{i}") for i in range(20)]


def to_prompt(example: Example, index: int) -> Prompt | None:
    return None if example.question in ("q3", "q4", "") else Prompt(index, [1], example)


def stream_of(rows, *, make=to_prompt, **settings) -> PromptStream:
    return PromptStream(rows, make, **{"batch_size": 4, "seed": 7, "shuffle": True, "buffer": 5, **settings})


@pytest.mark.parametrize("shuffle", [True, False])
def test_first_prompts_are_those_trained_first(shuffle: bool) -> None:
    order = stream_of(Stream(lambda: iter(ROWS)), shuffle=shuffle)
    assert order.first(6) == [*order.batch(0), *order.batch(1)][:6]


@pytest.mark.parametrize("rows", [ROWS, Stream(lambda: iter(ROWS))], ids=["table", "stream"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_stream_resumes_at_any_step(rows, shuffle: bool) -> None:
    order = stream_of(rows, shuffle=shuffle)
    whole = [order.batch(step) for step in range(12)]
    assert order.batch(11) == whole[11]
    assert order.batch(5) == whole[5]  # backwards too
    for step in (0, 3, 11):
        assert stream_of(rows, shuffle=shuffle).batch(step) == whole[step]
    seen = Counter(prompt.example.question for batch in whole[:9] for prompt in batch)
    assert seen == {f"q{i}": 2 for i in range(20) if i not in (3, 4)}  # 36 prompts: two epochs of 18
    assert all(len(batch) == 4 for batch in whole)


def test_seeds_and_epochs_differ_in_order() -> None:
    def questions(order: PromptStream) -> list[str]:
        return [prompt.example.question for step in range(9) for prompt in order.batch(step)]

    first = questions(stream_of(ROWS))
    assert first != questions(stream_of(ROWS, seed=8))
    assert first[:18] != first[18:]


def test_stream_without_prompts_is_refused() -> None:
    with pytest.raises(ConfigError, match="data.train: none of 1 rows makes a prompt: 1 is blank"):
        stream_of([Example("")], left_out=lambda: ["1 is blank"]).batch(0)
    endless = Stream(lambda: itertools.repeat(Example("")))
    with pytest.raises(ConfigError, match="none of 100000 rows makes a prompt"):
        stream_of(endless).batch(0)


def test_left_out_rows_are_logged_sparsely(caplog: pytest.LogCaptureFixture) -> None:
    times = itertools.count(1)
    order = stream_of(ROWS, left_out=lambda: [f"warning {next(times)}"])
    with caplog.at_level("WARNING", logger="distill_cli"):
        for step in range(100):
            order.batch(step)
    assert caplog.messages == [f"data.train, so far: warning {number}" for number in (1, 2, 3)]  # 4, 40, 400 rows


def test_wrong_row_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(list):
        def __getitem__(self, index):
            if index == 2:
                raise ConfigError("rows, row 2: question must be a text")
            return super().__getitem__(index)

    with caplog.at_level("WARNING", logger="distill_cli"):
        order = stream_of(Wrong(ROWS), shuffle=False)
        assert [p.example.question for p in order.batch(0)] == ["q0", "q1", "q5", "q6"]


def test_a_shuffle_buffer_keeps_every_item() -> None:
    assert sorted(shuffled(range(100), buffer=7, seed="a")) == list(range(100))
    assert list(shuffled(range(100), buffer=7, seed="a")) == list(shuffled(range(100), buffer=7, seed="a"))


def test_too_few_prompts_are_refused() -> None:
    prompts = [Prompt(i, [1], example) for i, example in enumerate(ROWS)]
    with pytest.raises(ConfigError, match="rollout.prompts_per_step=21: the training data has only 20 prompts"):
        PromptOrder(prompts, batch_size=21, seed=0, shuffle=True)
    order = PromptOrder(prompts, batch_size=8, seed=0, shuffle=True)
    epoch = [p.index for step in range(2) for p in order.batch(step)]
    assert len(set(epoch)) == 16
    assert [p.index for step in (2, 3) for p in order.batch(step)] != epoch


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")


def make(tokenizer, *, max_tokens: int = 40, teacher: dict | None = None, **settings) -> PromptMaker:
    teachers = (TeacherPromptSettings(**teacher or {}),)
    return PromptMaker(tokenizer, PromptSettings(max_tokens=max_tokens, teachers=teachers, **settings))


def test_long_and_empty_prompts_are_counted(tokenizer) -> None:
    rows = [Example("What is 1 + 1?"), Example("12 " * 400), Example(" "), Example("9" * 50_000_000)]
    drop = make(tokenizer)
    assert len(make_prompts(rows, drop, key="data.train")) == 1
    assert drop.warnings() == [
        "1 of 4 prompts have no question and are left out",
        "2 of 4 prompts are longer than 40 tokens and left out",
    ]
    cut = make(tokenizer, overlong="truncate", max_tokens=60)
    short, *long = make_prompts(rows, cut, key="data.train")
    assert cut.counts["cut"] == 2
    for prompt in long:
        assert 55 <= len(prompt.token_ids) <= 60
        assert prompt.token_ids[-3:] == short.token_ids[-3:]  # what the template ends with is still there
    with pytest.raises(ConfigError, match="no prompt is left: 1 of 1 prompts are longer than 5 tokens"):
        make_prompts(rows[:1], make(tokenizer, max_tokens=5), key="data.train")


def test_failing_template_names_its_row(tokenizer) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].content) if messages[0].content == 'q1' }}x"
    with pytest.raises(ConfigError, match="data.train, row 1: the prompt's template failed: TemplateError: no q1"):
        make_prompts(ROWS, make(tokenizer), key="data.train")


def test_conversations_and_system_prompts_are_rendered(tokenizer) -> None:
    earlier = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
    example = Example("three", messages=(*earlier, {"role": "user", "content": "three"}))
    prompt = make(tokenizer, system_prompt="be kind", prompt_template="<{question}>")(example, 0)
    assert tokenizer.decode(prompt.token_ids) == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\n<three><|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.targets == (Target(),)


def test_teacher_alone_reads_the_context(tokenizer) -> None:
    example = Example("{context}?", context="because {question}")
    maker = make(tokenizer, teacher={"has_context": True, "prompt_template": "{question} ({context})"})
    prompt = maker(example, 0)
    assert "because" not in tokenizer.decode(prompt.token_ids)
    assert "{context}? (because {question})<|im_end|>" in tokenizer.decode(prompt.targets[0].token_ids)
    maker = make(tokenizer, teacher={"chat_template": "T:{{ messages[0].content }}"}, max_tokens=80)
    own = maker(Example("{context}?"), 0)
    assert tokenizer.decode(own.targets[0].token_ids) == "T:{context}?"
    maker = make(tokenizer, teacher={"has_context": True, "max_tokens": 90}, overlong="truncate", max_tokens=60)
    prompt = maker(Example("What is 1 + 1?", context="1" * 500), 0)
    assert len(prompt.token_ids) < 40
    assert 85 <= len(prompt.targets[0].token_ids) <= 90


def test_next_prompts_are_made_meanwhile() -> None:
    made, go_on = [], threading.Event()

    def slow(example: Example, place: int) -> Prompt:
        if place >= 8:
            go_on.wait(10)
        made.append(place)
        return Prompt(place, [place], example)

    order = stream_of([Example(str(n)) for n in range(40)], make=slow, shuffle=False)
    assert [prompt.index for prompt in order.batch(0)] == [0, 1, 2, 3]
    assert [prompt.index for prompt in order.batch(1)] == [4, 5, 6, 7]
    assert made == list(range(8))  # the third is in the making
    go_on.set()
    assert [prompt.index for prompt in order.batch(2)] == [8, 9, 10, 11]
    assert [prompt.index for prompt in order.batch(0)] == [0, 1, 2, 3]


def test_errors_of_next_prompts_come_in_turn() -> None:
    def make(example: Example, place: int) -> Prompt:
        if place == 5:
            raise ConfigError("row 5: wrong")
        return Prompt(place, [place], example)

    order = stream_of([Example(str(n)) for n in range(40)], make=make, shuffle=False)
    assert len(order.batch(0)) == 4
    with pytest.raises(ConfigError, match="row 5: wrong"):
        order.batch(1)
