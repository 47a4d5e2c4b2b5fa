"""The loop on a made-up source and a small student: what is learned, recorded, validated and saved, in which order."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from distill_cli.checkpoint.saver import Trainable
from distill_cli.config.schema import Config, OnTruncation
from distill_cli.config.variation import override
from distill_cli.errors import Unrecoverable
from distill_cli.folders.metrics_file import MetricsFile, read_metrics
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import RunDir
from distill_cli.losses.distill_loss import DistillLoss
from distill_cli.losses.objective import Objective
from distill_cli.machine.processes import StopFlag
from distill_cli.parallel.mesh import Parallel, layout
from distill_cli.rollout.length_guard import LengthGuard
from distill_cli.rollout.pack import Planner, plan_batch
from distill_cli.rollout.source import RolloutSource, ScoredBatch
from distill_cli.rollout.stages import Stages, StopRequested
from distill_cli.student import attention
from distill_cli.student.model import Student, wrap
from distill_cli.student.optimizer import build_optimizer, build_schedule
from distill_cli.terminal.step_printer import StepPrinter
from distill_cli.train.run_log import RunLog
from distill_cli.train.run_state import Progress
from distill_cli.train.trainer import TRUNCATED_STEPS, Trainer
from distill_cli.train.validation import Score, Validation
from distill_cli.types import Rollout
from tests.rollout.doubles import RecordingSampler, RecordingTeacher, ask_to_stop, make_source
from tests.student.train_rank import made_up_model, made_up_rollout

CONFIG = override(
    Config(),
    {
        **{"train.max_grad_norm": 1.0, "train.max_bad_updates": 2, "rollout.max_truncated_rate": 0.9},
        "rollout.max_engine_mismatch": 100.0,  # made-up sequences have made-up log-probabilities
        **{"eval.period": 2, "eval.at_start": True, "eval.at_end": False, "checkpoint.period": 2},
    },
)


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield layout(device=torch.device("cpu"))
    dist.destroy_process_group()


class MadeUp(RolloutSource):
    """Eight sequences a step, in global batches of four."""

    def __init__(self, *, change: Callable[[Rollout], Rollout] = lambda rollout: rollout) -> None:
        self.change, self.before = change, lambda step: None

    def step(self, step: int) -> ScoredBatch:
        self.before(step)
        generator = torch.Generator().manual_seed(step)
        made = [made_up_rollout(i, 3, 4 + i, generator) for i in range(8)]
        rollouts = [self.change(rollout) for rollout, _ in made]
        plans = Planner(global_batch_size=4, rank=0, cut=partial(plan_batch, num_ranks=1, max_tokens=32)).plan(rollouts)
        return ScoredBatch(rollouts, plans, dict(enumerate(scores for _, scores in made)), metrics={"rollout/ours": 1})


@dataclass
class Saved:
    """A double of `Saver`."""

    steps: list[tuple[int, dict | None]] = field(default_factory=list)
    last_step: int = 0

    def save(self, step: int, state: dict, *, in_flight: object = None) -> None:
        assert in_flight is None
        assert "train/loss" in state["metrics"]
        self.last_step = step
        self.steps.append((step, state["unrecorded"]))

    def close(self) -> None:
        pass


@pytest.fixture
def make(parallel: Parallel, tmp_path: Path) -> Callable[..., Trainer]:
    def make(source: RolloutSource | None = None, *, factor: float = 1.0, **others: object) -> Trainer:
        attention.register()
        exact, lm = DistillLoss(kl_type="mixed"), made_up_model("qwen3", tied=True)
        student = Student(lm, objective=Objective(lambda *args: factor * exact(*args)), parallel=parallel)
        wrap(student, parallel, bf16=False)
        optimizer = build_optimizer(student, lr=1e-2)
        stop, run = StopFlag(), RunDir(tmp_path)
        parts = {
            "config": CONFIG,
            "num_steps": 3,
            "source": source or MadeUp(),
            "student": student,
            "trainable": Trainable(lm, optimizer, build_schedule(optimizer, warmup_updates=0, num_updates=6)),
            "stages": Stages(parallel, stop),
            "progress": Progress(),
            "log": RunLog(run, StepPrinter(io.StringIO(), num_steps=3), MetricsFile(run.metrics), 3, show=str),
            "rollouts": RolloutsFolder(tmp_path, decode=str, token_text=str),
            "validation": None,
            "probes": None,
            "saver": Saved(),
            "data_fingerprint": None,
        }
        trainer = Trainer(**{**parts, **others})
        trainer.ask_to_stop = lambda: ask_to_stop(stop)
        return trainer

    return make


class Measured:
    """Stands for `Validation`."""

    teachers = ()

    def __init__(self, scored: list[int], *, stop_at: int | None = None) -> None:
        self.scored, self.stop_at = scored, stop_at

    def score_student(self) -> Score:
        if len(self.scored) == self.stop_at:
            raise StopRequested("SIGTERM")
        self.scored.append(len(self.scored))
        return Score(0.5, 2.0, 0.0, 4)


def parameters(trainer: Trainer) -> list[torch.Tensor]:
    return [param.full_tensor().detach().clone() for param in trainer.student.parameters()]


def test_a_run_takes_records_and_saves(make, tmp_path: Path) -> None:
    trainer, scored = make(), []
    trainer.validation = Measured(scored)
    probed = []
    trainer.probes = SimpleNamespace(write=lambda step: probed.append(step) or {"probe/topk_overlap": 0.5})
    before = parameters(trainer)
    result = trainer.run()
    assert (result.state, result.num_steps, len(scored), probed) == ("finished", 3, 2, [0, 2, 3])
    assert trainer.saver.steps == [(2, None), (3, None)]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row["train/loss"] > 0 and row["rollout/ours"] == 1 for row in rows[1:])
    assert rows[1]["train/response_tokens"] == sum(range(4, 12))
    assert all({"time/pack_s", "time/train_s", "time/record_s", "time/step_s"} <= row.keys() for row in rows[1:])
    assert [("val/accuracy" in row) for row in rows] == [True, False, True, False]
    assert [("probe/topk_overlap" in row) for row in rows] == [True, False, True, True]
    assert any(not x.equal(y) for x, y in zip(before, parameters(trainer), strict=True))


def test_a_stop_before_updates_changes_nothing(make, tmp_path: Path) -> None:
    source = MadeUp()
    trainer = make(source)
    source.before = lambda step: trainer.ask_to_stop()
    before = parameters(trainer)
    result = trainer.run()
    assert (result.state, result.reason, result.num_steps) == ("stopped", "SIGTERM", 0)
    assert trainer.saver.steps == []
    assert all(x.equal(y) for x, y in zip(before, parameters(trainer), strict=True))


def test_stop_in_validation_saves_step(make) -> None:
    trainer = make(validation=Measured([], stop_at=1))
    result = trainer.run()
    ((step, unrecorded),) = trainer.saver.steps
    assert (result.state, result.num_steps, step) == ("stopped", 2, 2)
    resumed = make(progress=replace(trainer.progress), validation=Measured(scored := []))
    assert resumed.run().state == "finished"
    assert unrecorded["train/loss"] > 0
    assert len(scored) == 1  # before the third step is taken


def test_bad_updates_end_the_run(make, tmp_path: Path) -> None:
    trainer = make(factor=float("nan"))
    before = parameters(trainer)
    with pytest.raises(Unrecoverable, match=r"2 updates in a row.*bad_step_1.parquet"):
        trainer.run()
    assert (tmp_path / "bad_step_1.parquet").is_file()
    assert all(x.equal(y) for x, y in zip(before, parameters(trainer), strict=True))


@pytest.mark.parametrize("on_truncation", ["warn", "stop"])
def test_answers_without_end_are_noticed(make, on_truncation: str, caplog: pytest.LogCaptureFixture) -> None:
    source = MadeUp(change=lambda one: replace(one, sample=replace(one.sample, finish_reason="length")))
    config = override(CONFIG, {"rollout.on_truncation": OnTruncation(on_truncation)})
    trainer = make(source, config=config, num_steps=TRUNCATED_STEPS + 1)
    result = trainer.run()
    assert result.num_steps == TRUNCATED_STEPS + (on_truncation == "warn")
    assert ("max_truncated_rate=0.9" in (result.reason or "")) == (on_truncation == "stop")
    assert ("end-of-sequence" in caplog.text) == (on_truncation == "warn")


def test_guard_is_part_of_progress(make, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is stopped in a validation and resumed has the shares of one that is not."""

    def guard(left: int = 0) -> LengthGuard:
        return LengthGuard(above=0.5, most=0.4, steps=2, write=lambda prompts, seeds: [], left=left)

    def source(guard: LengthGuard, shares: list[float]) -> MadeUp:
        made = MadeUp()
        made.before = lambda step: shares.append(guard.share)
        made.change = lambda one: replace(one, sample=replace(one.sample, finish_reason=reasons[len(shares) - 1]))
        return made

    reasons = ["stop", "length", "stop", "stop", "stop"]
    whole, first = guard(), guard()
    make(source(whole, expected := []), guard=whole, num_steps=5).run()
    assert expected == [0, 0, 0.4, 0.2, 0]
    assert "100% of answers reach the length limit, rollout.guard_above=0.5: the teacher writes 40%" in caplog.text
    assert "the student writes all again" in caplog.text
    stopped = make(source(first, shares := []), guard=first, num_steps=5, validation=Measured([], stop_at=1))
    assert stopped.run().num_steps == 2
    state = {**asdict(stopped.progress)}
    resumed = Progress.of(state)
    second = guard(resumed.guard_left)
    made = source(second, shares)
    make(made, guard=second, num_steps=5, progress=resumed).run()
    assert shares == expected
    assert Progress.of({key: value for key, value in state.items() if key != "guard_left"}).guard_left == 0


def test_another_models_samples_end_run(make: Callable[..., Trainer]) -> None:
    config = override(CONFIG, {"rollout.max_engine_mismatch": None})
    with pytest.raises(Unrecoverable, match="step 1: sampler and trainer differ by .* and the limit is 0.1"):
        make(config=config).run()


def test_logp_of_older_weights_is_drift(make, tmp_path: Path) -> None:
    source = MadeUp()
    make(source).step(1)
    now = source.step(1)
    source.step = lambda step: replace(now, is_current=False)
    metrics = make(source).step(1)
    assert "rollout/drift" in metrics
    assert "rollout/engine_mismatch" not in metrics


def test_validation_wakes_what_it_measures(parallel: Parallel) -> None:
    source = make_source(parallel, calls := [])

    class Validator:
        datasets = ("",)

        def for_teacher(self, index: int, translation: None) -> "Validator":
            calls.append(f"as teacher {index} reads")
            return self

        def totals(self, engine: RecordingTeacher, datasets: Sequence[str], *, within: object) -> torch.Tensor:
            self.run(engine)
            return torch.ones(1, 4)

        def run(self, engine: RecordingSampler | RecordingTeacher) -> Score:
            calls.append(f"validate {engine.name}")
            return Score(1.0, 1.0, 0.0, 1)

    validation = Validation(Validator(), source.writer.worker, source.scoring.teachers)
    validation.score_student()
    validation.score_teachers()
    assert calls == [
        *("sampler wakes", "sync 0", "validate sampler", "sampler sleeps"),
        *("teacher wakes", "as teacher 0 reads", "validate teacher", "teacher sleeps"),
    ]
