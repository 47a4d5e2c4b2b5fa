"""Recorded steps: round trip, damage, and refusal of a config that does not fit them."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill_cli.config.compose import compose
from distill_cli.config.variation import override, save_config
from distill_cli.data.recorded_run import Facts, Recording, remove_later, step_folder, vocabulary_digest
from distill_cli.errors import ConfigError
from distill_cli.jobs.preflight import preflight
from distill_cli.machine.processes import StopFlag
from distill_cli.models.model_files import ASSETS
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.pack import Planner, lay_out, plan_batch
from distill_cli.rollout.score_files import (
    RecordedSteps,
    Recorder,
    Replay,
    read_scores,
    read_sequences,
    write_sequences,
)
from distill_cli.rollout.source import ScoredBatch
from distill_cli.rollout.stages import Stages, StopRequested
from distill_cli.types import Rollout, TeacherScores
from tests.rollout.doubles import ask_to_stop
from tests.student.train_rank import TOPK, made_up_rollout

STUDENT = ASSETS / "tiny_pair/student"


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture
def recorded(tmp_path: Path, parallel: Parallel) -> Path:
    """A run's folder with two recorded steps of 64 sequences."""
    run = tmp_path / "runs/recorded"
    run.mkdir(parents=True)
    (job,) = compose(["loss.topk=8", "rollout.save_scores=true"])
    save_config(job.config, run / "config.yaml")
    facts = Facts(8, 1.0, [], end_tokens=[2], vocab_size=512, vocabulary=vocabulary_digest(STUDENT, 512))
    recorder = Recorder(run / "scores", facts, parallel)
    for step in (1, 2):
        recorder.write(step, ScoredBatch(*made_up(step)))
    return run


def made_up(seed: int, number: int = 64) -> tuple[list[Rollout], list, dict[int, TeacherScores]]:
    """Sequences of every kind, no plans, and the scores of all."""
    generator = torch.Generator().manual_seed(seed)
    made = [made_up_rollout(index, 3 + index % 5, 2 + index % 7, generator) for index in range(number)]
    rollouts, scores = [rollout for rollout, _ in made], dict(enumerate(scores for _, scores in made))
    masked, other = rollouts[3].sample, rollouts[4].sample
    trained = [place % 2 == 0 for place in range(len(masked.token_ids))]
    masked = replace(masked, trained=trained, num_turns=2, finish_reason="turn_limit")
    rollouts[3] = replace(rollouts[3], sample=masked)
    rollouts[4] = replace(rollouts[4], sample=replace(other, logp=None, source="teacher"))
    for index in (5, 6):
        rollouts[index] = replace(rollouts[index], reward=float(index == 5))
    return rollouts, [], scores


def test_recorded_steps_round_trip(recorded: Path, parallel: Parallel) -> None:
    steps = RecordedSteps(Recording.of(str(recorded)), topk=TOPK, parallel=parallel)
    assert steps.steps_per_epoch == 2
    for step in (1, 2, 3):  # the third is the first again
        (expected, _, all_scores), read = made_up((step - 1) % 2 + 1), steps.rollouts(step)
        mine = list(range(63, 0, -3))
        scores = steps.scores(step, mine)
        assert list(scores) == mine
        assert [(r.token_ids, r.reward, r.prompt.index, r.sample) for r in read] == [
            (r.token_ids, r.reward, r.prompt.index, r.sample) for r in expected
        ]
        ((row,),) = plan_batch([len(one.token_ids) for one in read], num_ranks=1, max_tokens=10_000).rows
        row = replace(row, members=tuple(mine), places=tuple(len(read[place].token_ids) for place in mine))
        ours, theirs = (lay_out(row, *of) for of in ((read, scores), (expected, all_scores)))
        for name in ("input_ids", "rows", "sampled_ids", "sampler_logp", "has_sampler_logp"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        for name in ("topk_ids", "topk_logp", "sampled_logp"):
            assert torch.equal(getattr(ours.scores, name), getattr(theirs.scores, name)), name


def test_shuffled_steps_end_on_the_last(recorded: Path, parallel: Parallel) -> None:
    recording = replace(Recording.of(str(recorded)), num_steps=6)

    def order(seed: int, *, shuffle: bool = True) -> list[int]:
        steps = RecordedSteps(recording, topk=TOPK, parallel=parallel, seed=seed, shuffle=shuffle)
        return [int(steps._folder(step).name.removeprefix("step_")) for step in range(1, 13)]

    assert order(1, shuffle=False) == [*range(1, 7), *range(1, 7)]
    assert order(1) == order(1) != order(2)
    for seed in range(5):
        first, second = order(seed)[:6], order(seed)[6:]
        assert sorted(first) == sorted(second) == [*range(1, 7)]
        assert first[-1] == second[-1] == 6
    assert any(order(seed)[:6] != order(seed)[6:] for seed in range(5))


def test_a_replay_gives_recorded_steps(recorded: Path, parallel: Parallel) -> None:
    planner = Planner(global_batch_size=32, rank=1, cut=partial(plan_batch, num_ranks=2, max_tokens=64))
    steps, stop = RecordedSteps(Recording.of(str(recorded)), topk=3, parallel=parallel), StopFlag()
    source = Replay(steps, planner, Stages(parallel, stop))
    batch = source.step(2)
    assert [one.token_ids for one in batch.rollouts] == [one.token_ids for one in made_up(2)[0]]
    assert [plan.members for plan in batch.plans] == [list(range(32)), list(range(32, 64))]
    assert list(batch.scores) == planner.local_places(batch.plans) != []
    assert {scores.topk_ids.shape[1] for scores in batch.scores.values()} == {3}
    assert not batch.is_current
    ask_to_stop(stop)
    with pytest.raises(StopRequested):
        source.step(1)


def test_smaller_topk_is_the_likeliest(recorded: Path) -> None:
    file = step_folder(recorded / "scores", 1) / "rank_0.safetensors"
    whole, cut = (read_scores(file, set(range(64)), topk=topk) for topk in (TOPK, 3))
    for place, scores in cut.items():
        likeliest = whole[place].topk_logp.topk(3, dim=-1)
        assert torch.equal(scores.topk_logp, likeliest.values)
        assert torch.equal(scores.topk_ids.long(), whole[place].topk_ids.long().gather(1, likeliest.indices))


def test_several_ranks_files_make_one_step(tmp_path: Path) -> None:
    rollouts, _, scores = made_up(5, number=9)
    for rank in range(2):
        mine = {place: scores[place] for place in range(rank, 9, 2)}
        write_sequences(tmp_path / f"rank_{rank}.safetensors", rollouts, mine)
    files = [read_sequences(file) for file in sorted(tmp_path.glob("*.safetensors"))]
    together = files[0] | files[1]
    assert [together[place].token_ids for place in range(9)] == [rollout.token_ids for rollout in rollouts]


def test_failed_write_is_a_warning(recorded: Path, parallel: Parallel, caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder(recorded / "scores", Recording.of(str(recorded)).facts, parallel)
    (recorded / "scores/.step_3.tmp").write_text("no folder can be made here")
    with caplog.at_level(logging.WARNING):
        recorder.write(3, ScoredBatch(*made_up(3)))
    assert "scores of step 3" in caplog.text
    assert Recording.of(str(recorded)).num_steps == 2


def test_later_steps_are_removed(recorded: Path) -> None:
    remove_later(recorded / "scores", step=1)
    assert Recording.of(str(recorded)).num_steps == 1
    remove_later(recorded / "none", step=1)


def test_a_damaged_file_is_named(recorded: Path, parallel: Parallel) -> None:
    step = step_folder(recorded / "scores", 2)
    file = step / "rank_0.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    steps = RecordedSteps(Recording.of(str(recorded)), topk=TOPK, parallel=parallel)
    steps.rollouts(1)
    with pytest.raises(ConfigError, match=r"step_2\b.*rank_0.safetensors"):
        steps.rollouts(2)
    file.write_bytes(content[:-5])
    with pytest.raises(ConfigError, match="rank_0.safetensors .*train.max_steps=1"):
        Recording.of(str(recorded))
    shutil.rmtree(step_folder(recorded / "scores", 1))
    with pytest.raises(ConfigError, match="step 1 .*rollout.save_scores=true"):
        Recording.of(str(recorded))


QUIET = ("eval.period=0", "eval.at_start=false", "eval.at_end=false", "eval.record_samples=0")


def problems_of(recorded: Path, *argv: str) -> str:
    (job,) = compose([f"rollout.replay={recorded}", *QUIET, "loss.topk=8", *argv])
    with pytest.raises(ConfigError) as caught:
        preflight(job.config)
    return "\n".join(caught.value.problems)


@pytest.mark.parametrize(
    ("setting", "recorded_value"),
    [
        ("loss.topk=16", "8"),
        ("loss.temperature=2.0", "1.0"),
        ("rollout.temperature=0.5", "1.0"),
        ("rollout.max_new_tokens=4", "8"),
        ("rollout.max_sequence_length=10 rollout.max_new_tokens=8", "15"),
        ("data.train.size=9", "8192"),
        ("model.teacher.path=/gone", "package://tiny_pair"),
        ("rollout.save_scores=true", "replay"),
        ("eval.record_samples=4", "replay"),
        ("train.global_batch_size=7", "64"),
    ],
)
def test_mismatches_name_both_values(recorded: Path, setting: str, recorded_value: str) -> None:
    lines = problems_of(recorded, *setting.split()).splitlines()
    assert any(setting.split()[0] in line and recorded_value in line for line in lines), lines


def test_other_vocabulary_or_end_is_refused(recorded: Path, make_model) -> None:
    few = make_model("few", vocab_size=8)
    problems = problems_of(recorded, f"model.student.path={few}")
    assert " 8 ids" in problems
    assert "512" in problems
    other = make_model("other", vocab_size=512, eos_token_id=2)
    assert "tokens" in problems_of(recorded, f"model.student.path={other}")
    ends = make_model("ends", vocab_size=512, eos_token_id=7)
    problems = problems_of(recorded, f"model.student.path={ends}")
    assert "[7]" in problems
    assert "[2]" in problems


def test_replay_needs_no_teacher_or_data(recorded: Path) -> None:
    (job,) = compose([f"rollout.replay={recorded}", *QUIET, "loss.topk=4", "train.max_steps=50", "train.max_epochs=3"])
    gone = {"model.teacher.path": "/gone/teacher", "data.train": {"source": "jsonl", "path": "/gone.jsonl"}}
    config = override(job.config, gone)
    save_config(override(config, {"rollout.replay": None}), recorded / "config.yaml")
    resolved = preflight(config)
    assert (resolved.teachers, resolved.num_recorded_steps, resolved.num_steps) == ({}, 2, 6)
