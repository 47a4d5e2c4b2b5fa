"""Carry-over and staleness with an engine that writes known tokens: what each step writes, trains on and keeps."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.compose import compose
from distill_cli.data.environments import Observation
from distill_cli.data.order import PromptBatches, PromptOrder, PromptStream
from distill_cli.engines.base import Request, Sampler
from distill_cli.engines.settings import SamplingSettings
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.carry_over import CarryOver
from distill_cli.rollout.growing import request_seed
from distill_cli.rollout.in_flight import InFlight
from distill_cli.rollout.on_policy import OnPolicy
from distill_cli.rollout.pack import Planner, lay_out, plan_batch
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.stages import Stages
from distill_cli.rollout.step_writer import StepWriter
from distill_cli.rollout.turns import Turns
from distill_cli.rollout.workers import Responder, RolloutWorker, ScoringWorker
from distill_cli.train.step_metrics import rollout_metrics
from distill_cli.types import Example, Prompt, Rollout, Sample, TeacherScores
from tests.rollout.doubles import RecordingTeacher

END, ASK, SEEN = 9, 5, 4
LENGTHS = [2, 7, 1, 30, 4, 11, 3, 19, 5, 8, 1, 6]
"""Of the answers to the prompts, in the order of the data."""


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()


@dataclass
class Counting(Sampler):
    """Writes 10, 11, ... after the last ASK of a prompt [length, ASK]: `length` tokens in all, the last of them END.

    A log-probability is the version of the weights that wrote the token. Requests write a token each at a time.
    """

    version: int = -1
    requests: list[Request] = field(default_factory=list)
    num_ranks = 1

    def sync(self, named_tensors, *, version: int) -> None:
        self.version = version

    def reset_prefix_cache(self) -> None:
        pass

    def answer(self, request: Request, sampling: SamplingSettings) -> Sample:
        self.requests.append(request)
        ids, length = request.token_ids, request.token_ids[0]
        written = len(ids) - 1 - max(index for index, token in enumerate(ids) if token == ASK)
        limit = request.max_new_tokens or sampling.max_new_tokens
        new = [10 + i if i + 1 < length else END for i in range(written, min(length, written + limit))]
        return Sample(new, [-float(self.version)] * len(new), "stop" if new[-1] == END else "length")

    def sample(self, prompts, *, seeds, sampling, on_end=None) -> list[Sample]:
        return [self.answer(Request(ids, seed), sampling) for ids, seed in zip(prompts, seeds, strict=True)]

    def sample_chains(self, requests, *, sampling, then) -> None:
        answers = [self.answer(one, sampling) for one in requests]
        going = [(len(one.token_ids), index, one) for index, one in enumerate(answers)]
        while going:
            clock, index, sample = heapq.heappop(going)
            if (request := then(index, sample)) is not None:
                sample = self.answer(request, sampling)
                heapq.heappush(going, (clock + len(sample.token_ids), index, sample))


class Teacher(RecordingTeacher):
    """Scores with the token before each as the top-1."""

    def score(self, sequences, *, response_starts, hidden=False) -> list[TeacherScores]:
        self.calls.append([len(ids) - start for ids, start in zip(sequences, response_starts, strict=True)])
        rows = [torch.tensor(ids)[start - 1 : -1, None] for ids, start in zip(sequences, response_starts, strict=True)]
        return [TeacherScores.of_topk(one.int(), torch.zeros(len(one), 1), torch.zeros(len(one))) for one in rows]


Make = Callable[..., OnPolicy]


@pytest.fixture(scope="module")
def make(parallel: Parallel) -> Make:
    def make(
        *,
        lengths: list[int] = LENGTHS,
        slots: int = 4,
        budget: int | None = 20,
        limit: int = 16,
        batch_size: int = 2,
        generations: int = 1,
        max_age: int | None = None,
        turns: Turns | None = None,
        in_flight: InFlight | None = None,
        order: PromptOrder | PromptStream | None = None,
        limit_at: Callable[[int], int | None] = lambda step: None,
        **others: object,
    ) -> OnPolicy:
        prompts = [Prompt(i, [length, ASK], Example("?", str(length))) for i, length in enumerate(lengths)]
        order = order or PromptOrder(prompts, batch_size=slots // generations, seed=3, shuffle=True)
        stop, calls, steps = StopFlag(), [], [0]
        stages = Stages(parallel, stop)
        responder = Responder(SamplingSettings(max_new_tokens=limit), 1, decode=str, turns=turns)
        responder = replace(responder, verify=Judge())
        worker = RolloutWorker(Counting(), dict, lambda: steps[0], responder, stages)
        planner = Planner(batch_size, 0, partial(plan_batch, num_ranks=1, max_tokens=64))
        carry = CarryOver(PromptBatches(order), generations, slots, budget, max_age, worker) if budget else None
        scoring = ScoringWorker([Teacher("teacher", calls, stop)], planner, stages)
        writer = StepWriter(order, generations, worker, carry_over=carry, limit_at=limit_at)
        source = OnPolicy(writer, scoring, **others)
        source.in_flight = in_flight or InFlight()
        source.calls, source.updates = calls, steps
        return source

    return make


class Judge:
    """A verifier that is asked for the length of the whole last turn."""

    failures = type("None_", (), {"take": staticmethod(lambda: 0)})

    def __call__(self, pairs) -> list[float]:
        return [float(len(eval(text)) == int(answer)) for text, answer in pairs]


def run(source: OnPolicy, steps: range) -> list[ScoredBatch]:
    batches = []
    for step in steps:
        source.updates[0] = step - 1
        batches.append(source.step(step))
        source.commit()
    return batches


def answers(batches: list[ScoredBatch]) -> dict[tuple[int, int], list[list[int]]]:
    """The pieces of each answer, by slot and place in the data."""
    pieces = defaultdict(list)
    for batch in batches:
        for slot, rollout in zip(batch.slots, batch.rollouts, strict=True):
            before = pieces[slot, rollout.prompt.index]
            assert [token for piece in before for token in piece] == (rollout.carried or Sample([], [], "")).token_ids
            before.append(rollout.sample.token_ids)
            if rollout.sample.finish_reason:
                pieces[slot, rollout.prompt.index, "done"].append([*chain(*pieces.pop((slot, rollout.prompt.index)))])
    return pieces


def test_each_step_writes_its_budget(make: Make) -> None:
    source = make()
    batches = run(source, range(1, 9))
    for batch in batches:
        by_slot = defaultdict(int)
        for slot, rollout in zip(batch.slots, batch.rollouts, strict=True):
            by_slot[slot] += len(rollout.sample.token_ids)
        assert by_slot == dict.fromkeys(range(4), 5)
    assert {len(plans.members) > 0 for batch in batches for plans in batch.plans} == {True}
    assert {len(batch.plans) for batch in batches} == {2}
    (uneven,) = run(make(budget=22), range(1, 2))
    pairs = list(zip(uneven.slots, uneven.rollouts, strict=True))
    assert [sum(len(one.sample.token_ids) for slot, one in pairs if slot == i) for i in range(4)] == [6, 6, 5, 5]


def test_parts_make_up_whole_answers(make: Make) -> None:
    batches = run(make(), range(1, 30))
    done = {key: texts for key, texts in answers(batches).items() if key[-1] == "done"}
    assert {index for _, index, _ in done} == set(range(12))
    for (_, index, _), texts in done.items():
        expected = [*range(10, 9 + LENGTHS[index]), END][:16]
        assert all(text == expected for text in texts)


def test_slots_follow_the_order(make: Make) -> None:
    source = make()
    batches = run(source, range(1, 30))
    for slot in range(4):
        own = [r for batch in batches for s, r in zip(batch.slots, batch.rollouts, strict=True) if s == slot]
        begun = [rollout.prompt.index for rollout in own if rollout.carried is None]
        assert begun == [source.writer.prompts.batch(number)[slot].index for number in range(len(begun))]


def test_parts_have_seeds_of_their_own(make: Make) -> None:
    source = make(lengths=[30] * 4, limit=40)
    run(source, range(1, 3))
    first, second = source.writer.worker.sampler.requests[:4], source.writer.worker.sampler.requests[4:8]
    seeds = [source.writer.worker.responder.seed_of(step=1, sequence=slot) for slot in range(4)]
    assert [request.seed for request in first] == seeds
    assert [request.seed for request in second] == [request_seed(seed, 1) for seed in seeds]
    assert len({*seeds, *(request.seed for request in second)}) == 8
    assert [len(request.token_ids) for request in second] == [2 + 5] * 4


def test_only_new_tokens_are_scored_and_trained(make: Make) -> None:
    source = make(lengths=[30] * 4, limit=40)
    batch = run(source, range(1, 4))[-1]
    assert source.calls == ["teacher wakes", [5] * 4, "teacher sleeps"] * 3
    rows = [lay_out(plan, batch.rollouts, batch.scores) for plans in batch.plans for plan in plans.rows[0]]
    for row in rows:
        assert row.input_ids[0, row.rows + 1].tolist() == row.sampled_ids.tolist()
        assert row.input_ids[0, row.rows].tolist() == row.scores.topk_ids[:, 0].tolist()
        assert row.trained_places.tolist() == [[i, 15] for i in range(10, 15)] * (len(row.rows) // 5)
    assert sum(len(row.rows) for row in rows) == 20


def test_parts_may_be_scored_as_they_end(make: Make) -> None:
    late, source = run(make(), range(1, 6)), make()
    source.scoring = replace(source.scoring, begins_early=True)
    for one, other in zip(run(source, range(1, 6)), late, strict=True):
        assert (one.rollouts, one.plans) == (other.rollouts, other.plans)
        assert one.scores.keys() == other.scores.keys() == set(range(len(one.rollouts)))
        for place, scores in other.scores.items():
            assert one.scores[place].topk_ids.equal(scores.topk_ids)


def test_answers_count_when_they_end(make: Make) -> None:
    batches = run(make(lengths=[12] * 4, limit=40), range(1, 4))
    assert [rollout_metrics(batch.rollouts) for batch in batches[:2]] == [{}, {}]
    metrics = rollout_metrics(batches[2].rollouts)
    assert metrics["rollout/mean_length"] == 12
    assert metrics["rollout/accuracy"] == 1
    assert metrics["rollout/truncated_rate"] == 0
    (cut,) = run(make(lengths=[12] * 4, limit=8, budget=32), range(1, 2))
    assert rollout_metrics(cut.rollouts)["rollout/truncated_rate"] == 1
    assert rollout_metrics(cut.rollouts)["rollout/accuracy"] == 0


def test_ages_are_counted_and_bounded(make: Make) -> None:
    batches = run(make(lengths=[12] * 4, limit=40), range(1, 4))
    assert [batch.metrics["rollout/mean_age"] for batch in batches] == [1, 2, 1]
    assert [batch.metrics["rollout/carried"] for batch in batches] == [4, 4, 4]
    young = run(make(lengths=[12] * 8, limit=40, max_age=2), range(1, 6))
    assert [batch.metrics["rollout/oldest"] for batch in young] == [1, 2, 1, 2, 1]
    assert [batch.metrics["rollout/dropped"] for batch in young] == [0, 0, 4, 0, 4]
    assert all(rollout.carried is None for batch in (young[2], young[4]) for rollout in batch.rollouts)


def test_answers_to_one_prompt_differ_in_seed(make: Make) -> None:
    source = make(generations=2)
    batch = run(source, range(1, 2))[0]
    pairs = list(zip(batch.slots, batch.rollouts, strict=True))
    first = {slot: rollout.prompt.index for slot, rollout in reversed(pairs)}
    assert first[0] == first[1] != first[2] == first[3]
    assert len({request.seed for request in source.writer.worker.sampler.requests}) == len(batch.rollouts)


class Countdown:
    """Goes on as often as it was told."""

    def __init__(self, turns: int) -> None:
        self.left = turns

    def reset(self, example: Example) -> str:
        return example.question

    def step(self, response: str) -> Observation:
        self.left -= 1
        return Observation("go on", reward=float(self.left == 0), done=self.left == 0)


def turns_of(number: int, *, max_tokens: int = 200) -> Turns:
    make = partial(Countdown, number)
    return Turns(make, 5, max_tokens, decode=str, observation_ids=lambda text, last: [SEEN, ASK])


@pytest.mark.parametrize("budget", [4, 12, 20, 100])
def test_turns_may_be_cut(make: Make, budget: int) -> None:
    batches = run(make(lengths=[6] * 4, budget=budget, turns=turns_of(3)), range(1, 30))
    turn = [10, 11, 12, 13, 14, END]
    whole = [*turn, SEEN, ASK, *turn, SEEN, ASK, *turn]
    ended = [one for batch in batches for one in batch.rollouts if one.sample.finish_reason]
    assert len(ended) >= 4 * (29 * budget // 4 // 18) > 0
    for rollout in ended:
        assert rollout.answer.token_ids == whole
        assert rollout.answer.trained == [token not in (SEEN, ASK) for token in whole]
        assert (rollout.answer.num_turns, rollout.reward, rollout.sample.finish_reason) == (3, 1.0, "stop")
    for batch in batches:
        assert sum(one.sample.num_trained for one in batch.rollouts) == budget


def test_staleness_is_a_fixed_lag(make: Make) -> None:
    for lag in (0, 1, 3):
        for budget in (None, 20):
            batches = run(make(budget=budget, staleness=lag), range(1, 8))
            for step, batch in enumerate(batches, 1):
                wrote = {-logp for one in batch.rollouts for logp in one.sample.logp}
                assert wrote == {max(step - 1 - lag, 0)}
                assert batch.is_current == (lag == 0)


def test_stale_steps_train_on_the_same_prompts(make: Make) -> None:
    fresh, stale = (run(make(budget=None, staleness=lag), range(1, 7)) for lag in (0, 2))
    for one, other in zip(fresh, stale, strict=True):
        assert [r.prompt for r in one.rollouts] == [r.prompt for r in other.rollouts]
        assert [r.sample.token_ids for r in one.rollouts] == [r.sample.token_ids for r in other.rollouts]


def test_limits_follow_their_schedule(make: Make) -> None:
    for budget in (None, 160):
        limits = {1: 3, 2: 3, 3: 8, 4: 8}
        batches = run(make(lengths=[30] * 4, limit=30, budget=budget, limit_at=limits.get), range(1, 5))
        ends = [{len(r.answer.token_ids) for r in batch.rollouts if r.sample.finish_reason} for batch in batches]
        assert ends == [{3}, {3}, {8}, {8}]


@hypothesis_settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_resumed_sources_go_on_exactly(make: Make, tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is in flight goes through a file; prompts are found again."""
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=8, max_size=12))
    with_turns = data.draw(st.booleans())
    settings = {
        "lengths": lengths,
        "budget": data.draw(st.sampled_from([None, 4, 7, 20, 61])),
        "staleness": data.draw(st.integers(0, 3)),
        "max_age": data.draw(st.sampled_from([None, 1, 3])),
        "generations": data.draw(st.sampled_from([1, 2])),
    }
    if with_turns:
        settings |= {"turns": turns_of(2)}
    at, last = data.draw(st.integers(1, 5)), 8
    alone = run(make(**settings), range(1, last))
    first = make(**settings)
    before = run(first, range(1, at + 1))
    first.step(at + 1)  # what is not committed leaves nothing
    state, kept = first.state, None
    if state is not None:
        state.save(tmp_path / "in_flight")
        kept = InFlight.load(tmp_path / "in_flight", first.writer.prompts.batch)
        assert kept == state
    after = run(make(**settings, in_flight=kept), range(at + 1, last))
    for one, other in zip(alone, [*before, *after], strict=True):
        assert (one.rollouts, one.slots, one.metrics) == (other.rollouts, other.slots, other.metrics)
        assert one.plans == other.plans


def test_streams_are_read_once(make: Make) -> None:
    """Slots are at different batches; a stream must not begin again for those behind."""
    reads = []

    def prompt(example: Example, place: int) -> Prompt:
        reads.append(place)
        return Prompt(place, [int(example.answer), ASK], example)

    rows = [Example("?", str(length)) for length in [1, 1, 1, 16] * 50]
    stream = PromptStream(rows, prompt, batch_size=4, seed=0, shuffle=False, buffer=10)
    run(make(order=stream), range(1, 12))
    assert reads == list(range(len(reads)))
    assert len(reads) > 100


def problems(*overrides: str) -> list[str]:
    (job,) = compose(overrides)
    return config_problems(job.config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=reward", "rollout.generations_per_prompt=2"], "before its reward is known"),
        (["loss/token_weight=last_fraction"], "loss.token_weight=last_fraction: with rollout.carry_over"),
        (["rollout.stop=[done]"], "a string may be cut in two"),
        (["rollout.on_policy_fraction=0.5"], "rollout.on_policy_fraction=0.5: with rollout.carry_over"),
        (["rollout.guard_above=0.5"], "rollout.guard_above=0.5: with rollout.carry_over"),
        (["rollout.tokens_per_step=10"], "rollout.tokens_per_step=10: 64 answers are written at a time"),
        (["rollout.tokens_per_step=0"], "must be at least 1"),
        (["rollout.max_age=0"], "must be at least 1"),
        (["rollout.staleness=-1"], "must be at least 0"),
        (["rollout.staleness=1", "rollout.score_while_sampling=true"], "scored steps later"),
    ],
)
def test_what_cannot_be_carried_is_refused(overrides: list[str], message: str) -> None:
    found = problems("rollout.carry_over=true", *overrides)
    assert any(message in line for line in found), found
    assert problems("rollout.carry_over=true", "loss/token_weight=position", "rollout.staleness=2") == []


@pytest.mark.parametrize(
    "schedule", ["{}", "{5:8}", "{0:0}", "{0:8,-1:4}", "{a:8}", "{0:x}", "some", "1.5", "true", "null", "0", "[8]"]
)
def test_wrong_length_schedules_are_refused(schedule: str) -> None:
    (line,) = problems(f"rollout.max_new_tokens={schedule}")
    assert line.startswith("rollout.max_new_tokens=")
    assert "{0: 256, 100: 1024}" in line


def test_a_length_schedule_holds_from_its_steps() -> None:
    (job,) = compose(["rollout.max_new_tokens={0:16,2:32,7:64}"])
    rollout = job.config.rollout
    assert config_problems(job.config) == []
    limits = [rollout.max_new_tokens_at(step) for step in (1, 2, 3, 7, 8, 100)]
    assert limits == [16, 16, 32, 32, 64, 64]
    assert rollout.longest_answer == 64
    (job,) = compose(["rollout.max_new_tokens={0:16,2:32,7:640}"])
    assert any("rollout.max_sequence_length" in line for line in config_problems(job.config))


def test_epochs_do_not_end_a_carried_run() -> None:
    typed = ["rollout.carry_over=true", "train.max_epochs=2"]
    (job,) = compose(typed)
    assert any("train.max_epochs has no effect" in line for line in inert_overrides(job.config, typed))
    typed = ["rollout.max_age=2"]
    (job,) = compose(typed)
    assert any("without rollout.carry_over" in line for line in inert_overrides(job.config, typed))


def test_samples_are_joined_and_cut() -> None:
    one, two = Sample([1, 2], [-1.0, -2.0], "", trained=None), Sample([3], [-3.0], "stop", trained=[False], num_turns=2)
    both = one + two
    assert both == Sample([1, 2, 3], [-1.0, -2.0, -3.0], "stop", trained=[True, True, False], num_turns=2)
    assert both.part(2) == replace(two)
    assert (one + replace(two, logp=None)).logp is None
    assert both.num_trained == 2
    assert Rollout(Prompt(0, [7], Example("?")), two, carried=one).token_ids == [7, 1, 2, 3]
    assert all(a < b for a, b in pairwise([request_seed(1, 0), request_seed(1, 1)]))
