"""Environments in a process of their own: what becomes of one that hangs, raises, dies or prints, and of the others."""

import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from distill_cli.data.environments import Observation
from distill_cli.data.isolated import Failed, IsolatedEnvironments
from distill_cli.data.prompts import PromptMaker, PromptSettings, make_prompts
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.errors import ConfigError
from distill_cli.models.model_files import ASSETS
from distill_cli.rollout.growing import sample_turns
from distill_cli.rollout.turns import Turns
from distill_cli.types import Example, Prompt, Sample

MINE = """
import os, time
from distill_cli.data.environments import Observation

class Mine:
    def reset(self, example):
        print('noise')
        if example.answer == 'none': raise KeyError('no such game')
        self.turns, self.number = [], int(example.answer)
        return example.question + '!'

    def step(self, response):
        self.turns.append(response)
        if response == 'raise': raise ValueError('lost')
        if response == 'exit': os._exit(3)
        if response == 'sleep': time.sleep(60)
        while response == 'deaf':
            try: time.sleep(60)
            except BaseException: pass
        if response == 'text': return 'go on'
        if response == 'nan': return Observation('x', reward=float('nan'))
        return Observation(f'{self.number}: ' + ' '.join(self.turns), reward=len(self.turns), done=response == 'end')

def make():
    return Mine()
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "games.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("games", None)
    environments = IsolatedEnvironments("games:make", limit_s=0.3)
    yield environments
    environments.close()


def test_failing_environment_spares_the_others(mine: IsolatedEnvironments) -> None:
    other = mine.make()
    assert other.reset(Example("q", "7")) == "q!"
    words = []
    for word in ("raise", "exit", "sleep", "deaf", "text", "nan"):
        failing = mine.make()
        failing.reset(Example("q", "1"))
        with pytest.raises(Failed):
            failing.step(word)
        words.append(word)
        assert other.step(word[:2]) == Observation(
            "7: " + " ".join(one[:2] for one in words), reward=float(len(words)), done=False
        )
    assert other.step("end").done
    assert mine.worker.num_ends == 2  # `exit` and `deaf` took the process with them


def test_places_are_used_again(mine: IsolatedEnvironments) -> None:
    for number in range(20):
        one = mine.make()
        one.reset(Example("q", str(number)))
        assert one.step("a").text == f"{number}: a"
    assert len(mine._free) <= 2


class Scripted(AnsweringEngine):
    """A sampler whose answers are the prompt's last token."""

    num_ranks = 1

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        return [Sample([ids[-1]], [0.0], "stop") for ids in prompts]


def test_failed_environments_score_zero(mine: IsolatedEnvironments) -> None:
    words = ["end", "raise", "deaf", "end", "end"]
    answers = ["1", "2", "3", "none", "5"]
    prompts = [Prompt(i, [i], Example("?", answer)) for i, answer in enumerate(answers)]
    turns = Turns(mine.make, 3, 100, decode=lambda ids: words[ids[0]], observation_ids=lambda text, last: [last])
    settings = SamplingSettings(max_new_tokens=1)
    rollouts = sample_turns(prompts, seeds=range(5), engine=Scripted(), sampling=settings, turns=turns)
    assert [rollout.reward for rollout in rollouts] == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert all(rollout.sample.finish_reason == "stop" for rollout in rollouts)
    assert (turns.failures.take(), turns.failures.take()) == (3, 0)


def test_rows_refused_by_environment_are_dropped(mine: IsolatedEnvironments) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair/student")

    def maker() -> PromptMaker:
        return PromptMaker(tokenizer, PromptSettings(max_tokens=100), opening=mine.make().reset)

    make = maker()
    prompts = make_prompts([Example("one", "1"), Example("two", "none")], make, key="data.train")
    assert "one!" in tokenizer.decode(prompts[0].token_ids)
    assert make.warnings() == [
        "1 of 2 prompts are refused by the environment and left out; the last: row 1: KeyError: 'no such game'"
    ]
    with pytest.raises(ConfigError, match="1 of 1 prompts are refused .*; the last: row 0: KeyError"):
        make_prompts([Example("two", "none")], maker(), key="data.train")
