"""Several turns: appended tokens, trained tokens, ends of sequences; and the environments in the package."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill_cli.config.checks import config_problems
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.data.environments import Observation
from distill_cli.data.environments.calculator import Calculator, calculate
from distill_cli.data.environments.guess import Guess
from distill_cli.data.registry import names, resolve_environment
from distill_cli.engines.base import AnsweringEngine
from distill_cli.engines.settings import SamplingSettings
from distill_cli.losses import linear_divergence
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.models.model_files import ASSETS
from distill_cli.rollout.early_scores import submit
from distill_cli.rollout.pack import micro_batches, plan_batch, trained_tokens
from distill_cli.rollout.turns import Turns, observation_encoder
from distill_cli.rollout.workers import Responder
from distill_cli.student import attention
from distill_cli.student.model import Student
from distill_cli.train.step_metrics import rollout_metrics
from distill_cli.types import Example, Prompt, Rollout, Sample, Target
from tests.student.train_rank import made_up_model, made_up_rollout

END = 2


class Parrot(AnsweringEngine):
    """A sampler that answers a prompt with its length and the seed."""

    num_ranks = 1

    def __init__(self, *, cut_from: int = 1000) -> None:
        self.prompts: list[list[int]] = []
        self.cut_from = cut_from

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        self.prompts += prompts
        logp = [-1.0, -2.0, -3.0] if sampling.logp else None
        return [
            Sample([len(ids), seed % 97 + 100], logp and logp[:2], "length")
            if len(ids) >= self.cut_from
            else Sample([len(ids), seed % 97 + 100, END], logp, "stop")
            for ids, seed in zip(prompts, seeds, strict=True)
        ]


class Countdown:
    """Goes on as often as the example's answer says."""

    def reset(self, example: Example) -> str:
        self.left = int(example.answer)
        return example.question

    def step(self, response: str) -> Observation:
        self.left -= 1
        return Observation("go on", reward=float(self.left == 0), done=self.left == 0)


def sample(
    answers: list[str], *, make=Countdown, max_turns=3, max_tokens=100, sampler=None, seeds=None, logp=True
) -> list[Rollout]:
    prompts = [Prompt(i, [50, 51, 52 + i], Example("?", answer)) for i, answer in enumerate(answers)]
    turns = Turns(make, max_turns, max_tokens, decode=str, observation_ids=lambda text, last: [90, last, 91])
    responder = Responder(SamplingSettings(max_new_tokens=4, logp=logp), seed=0, decode=str, turns=turns)
    return responder.respond(sampler or Parrot(), prompts, seeds=seeds or range(len(answers)))


def test_sequences_end_done_or_turn_limited() -> None:
    one, three, five = sample(["1", "3", "5"])
    assert [r.sample.finish_reason for r in (one, three, five)] == ["stop", "stop", "turn_limit"]
    assert [r.sample.num_turns for r in (one, three, five)] == [1, 3, 3]
    assert [r.reward for r in (one, three, five)] == [1.0, 1.0, 0.0]
    assert one.sample.token_ids == [3, 100, END]
    metrics = rollout_metrics([one, three, five])
    assert metrics["rollout/mean_turns"] == pytest.approx(7 / 3)
    assert metrics["rollout/turn_limit_rate"] == pytest.approx(1 / 3)
    assert metrics["rollout/truncated_rate"] == 0
    assert metrics["rollout/mean_length"] == pytest.approx(7)  # three tokens a turn, observations left out


def test_observations_are_appended_and_not_trained() -> None:
    sampler = Parrot()
    (rollout,) = sample(["2"], sampler=sampler)
    sent = rollout.sample
    assert sent.token_ids[3:6] == [90, END, 91]
    assert sent.trained == [True] * 3 + [False] * 3 + [True] * 3
    assert sent.logp == [-1, -2, -3, 0, 0, 0, -1, -2, -3]
    assert sampler.prompts[1] == rollout.prompt.token_ids + sent.token_ids[:6]
    assert sent.written_ids == sent.token_ids[:3] + sent.token_ids[6:]
    assert sent.last_turn_ids == sent.token_ids[6:]
    assert trained_tokens(sent).tolist() == [0, 1, 2, 6, 7, 8]


def test_limits_of_turns_and_sequences() -> None:
    (cut,) = sample(["3"], sampler=Parrot(cut_from=5))  # the second turn reaches its own limit
    assert (cut.sample.finish_reason, cut.sample.num_turns) == ("length", 2)
    for limit in range(4, 25):
        (rollout,) = sample(["3"], max_tokens=limit)
        assert len(rollout.token_ids) <= limit
        assert rollout.sample.trained[-1]
        assert (rollout.sample.finish_reason == "length") == (limit < 18)  # 3 + 3 turns + 2 observations
    assert rollout_metrics([cut])["rollout/truncated_rate"] == 1


def test_samples_without_logp_are_refused() -> None:
    whole, bare = sample(["3"])[0], sample(["3"], logp=False)[0]
    assert bare.sample == replace(whole.sample, logp=None)
    with pytest.raises(AssertionError, match="logp=False"):
        submit([(whole, Target()), (bare, Target())], None)


def test_sequences_do_not_depend_on_others() -> None:
    together = sample(["3", "1", "5"], seeds=[7, 8, 9])
    alone = [sample([a], seeds=[s])[0].sample.written_ids for a, s in zip(("3", "1", "5"), (7, 8, 9), strict=True)]
    assert [r.sample.written_ids for r in together] == alone
    turns = together[2].sample.written_ids[1::3]
    assert all(one != other for one, other in pairwise(turns))  # a seed of its own each turn


def test_environment_failure_ends_one_sequence(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Countdown):
        def step(self, response: str) -> Observation:
            if self.left == 4:
                raise ValueError("lost")
            return super().step(response)

    fine, broken = sample(["2", "4"], make=Broken)
    assert (fine.reward, broken.reward) == (1.0, 0.0)
    assert broken.sample.finish_reason == "stop"
    assert "ValueError: lost" in caplog.text


def test_verifier_judges_the_last_turn() -> None:
    class Silent(Countdown):
        def step(self, response: str) -> Observation:
            return Observation("go on", done=super().step(response).done)

    judge = Responder(
        SamplingSettings(max_new_tokens=4),
        seed=0,
        decode=lambda ids: str(ids[0]),
        verify=lambda pairs: [float(text == "9") for text, _ in pairs],
    )
    (judged,) = judge.judge(sample(["2"], make=Silent))
    assert judged.reward == 1.0


def test_masked_loss_equals_dense_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        linear_divergence, "chunk_size", lambda *_, **__: 5
    )  # several to a micro-batch, as in a large one
    generator = torch.Generator().manual_seed(3)
    made = [made_up_rollout(i, *lengths, generator) for i, lengths in enumerate([(4, 9), (7, 12), (2, 5)])]
    masks = [torch.rand(len(r.sample.token_ids), generator=generator) < 0.6 for r, _ in made]
    rollouts = [
        replace(rollout, sample=replace(rollout.sample, trained=mask.tolist(), num_turns=2))
        for (rollout, _), mask in zip(made, masks, strict=True)
    ]
    scores = {place: scores for place, (_, scores) in enumerate(made)}
    attention.register()
    loss = DistillLoss(kl_type="mixed", kl_weight=0.3)
    student = Student(made_up_model("qwen3", tied=True), objective=Objective(loss))
    config = copy.deepcopy(student.lm.config)  # a shared one would take our attention away from the student
    dense = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    dense.load_state_dict(copy.deepcopy(student.lm.state_dict()))

    number = torch.tensor(float(sum(mask.sum() for mask in masks)))
    plan = plan_batch([len(r.token_ids) for r in rollouts], num_ranks=1, max_tokens=24)
    context = type("One", (), {"size": lambda self: 1, "get_local_rank": lambda self: 0})()
    parallel = type("Alone", (), {"data_rank": 0, "context": context})()
    ours = 0.0
    for batch in micro_batches(plan, rollouts, scores, parallel=parallel):
        loss, _ = student(batch, num_loss_tokens=number)
        loss.backward()
        ours += float(loss.detach())

    theirs = torch.zeros(())
    for place, (rollout, mask) in enumerate(zip(rollouts, masks, strict=True)):
        start = len(rollout.prompt.token_ids)
        logp = dense(torch.tensor([rollout.token_ids])).logits[0, start - 1 : -1].log_softmax(-1)
        p, q = scores[place].topk_logp.exp(), logp.gather(1, scores[place].topk_ids.long()).exp()
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
        per_token = 0.3 * (p * (p / q).log()).sum(-1) + 0.7 * (q * (q / p).log()).sum(-1)
        theirs = theirs + per_token[mask].sum() / number
    theirs.backward()
    assert ours == pytest.approx(float(theirs), rel=1e-5)
    for (name, one), other in zip(student.lm.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_observation_has_template_markers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny_pair" / "student")
    end = tokenizer.eos_token_id
    encode = observation_encoder(tokenizer, template_kwargs={}, end_ids={end})
    turn = [*tokenizer.encode("#### 7", add_special_tokens=False), end]
    conversation = [
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": "#### 7"},
        {"role": "user", "content": "7 is too low. Try again."},
    ]
    first = tokenizer.apply_chat_template(conversation[:1], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(first, add_special_tokens=False) + turn + encode("7 is too low. Try again.", end)
    assert ids == tokenizer.encode(whole, add_special_tokens=False)
    assert encode("x", 5)[0] == end  # a turn that a stop string ended is closed first
    tokenizer.chat_template = None
    assert tokenizer.decode(observation_encoder(tokenizer, template_kwargs={}, end_ids=set())("x", 5)) == "\nx\n"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("47 + 85", "132"),
        ("(1+2)*3 - -4", "13"),
        ("7/2", "3.5"),
        ("1/0", "error: division by zero"),
        ("2**9", "error: not an expression of numbers, + - * / and brackets"),
        ("__import__('os')", "error: not an expression of numbers, + - * / and brackets"),
        ("1e308*10", "inf"),
        ("1+" * 90 + "1", "91"),
        ("9" * 201, "error: longer than 200 characters"),
        ("1 + )", "error: not an expression of numbers, + - * / and brackets"),
    ],
)
def test_calculator_only_calculates(expression: str, value: str) -> None:
    assert calculate(expression) == value


def test_calculator_answers_calls_and_ends() -> None:
    calculator = Calculator()
    assert "<calc>" in calculator.reset(Example("What is 6 * 7?", "42"))
    assert calculator.step("I ask <calc>6 * 7</calc>") == Observation("42")
    assert calculator.step("It is 42.") == Observation(done=True)


def test_guess_and_check() -> None:
    game = Guess()
    assert game.reset(Example("What is 500 + 660?", "1,160")) == "What is 500 + 660?"
    assert game.step("500 + 660 = 1,100") == Observation("1100 is too low. Try again.", reward=0.0)
    assert game.step("then #### 1200") == Observation("1200 is too high. Try again.", reward=0.0)
    assert game.step("no idea").text.startswith("There is no number")
    assert game.step("#### 1160.0") == Observation(reward=1.0, done=True)


def test_max_turns_needs_an_environment() -> None:
    assert {"calculator", "guess"} <= set(names("environments"))
    assert isinstance(resolve_environment("guess")(), Guess)
    config = override(Config(), {"rollout.max_turns": 2})
    assert any(line.startswith("rollout.max_turns=2:") for line in config_problems(config))
