"""A checkpoint that cannot be written: what was there stays, and training goes on."""

import logging
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distill_cli.checkpoint import store
from distill_cli.checkpoint.saver import Saver, Trainable, load
from distill_cli.config.schema import Config
from distill_cli.config.variation import save_config
from distill_cli.folders import atomic_dir
from distill_cli.folders.run_dir import RunDir


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trainable() -> Trainable:
    model = torch.nn.Linear(200, 200)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model(torch.ones(200)).sum().backward()
    optimizer.step()
    schedule.step()
    return Trainable(model, optimizer, schedule)


def save(saver: Saver, step: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Save a checkpoint; return the warnings."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        saver.save(step, {"metrics": {}})
        saver.finish()
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def steps(run: RunDir) -> list[int]:
    return [checkpoint.step for checkpoint in store.find(run.checkpoints)]


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_full_disk_keeps_earlier_checkpoints(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(small_disk / "run")
    run.path.mkdir()
    save_config(Config(), run.config)
    saver = Saver(run, trainable())  # of half a MiB
    assert save(saver, 1, caplog) == []
    (warning,) = save(saver, 2, caplog)
    assert warning == "no checkpoint of step 2: No space left on device; step_1 is kept; training goes on"
    assert steps(run) == [1]
    assert atomic_dir.damage(run.checkpoints / "step_1") is None
    assert not list(run.checkpoints.glob(".*"))
    saver.close()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_size_limit_is_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    save_config(Config(), run.config)
    saver = Saver(run, trainable())
    assert save(saver, 1, caplog) == []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        (warning,) = save(saver, 2, caplog)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert warning == "no checkpoint of step 2: File too large; step_1 is kept; training goes on"
    assert save(saver, 3, caplog) == []
    saver.close()
    assert steps(run) == [1, 3]


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_save_takes_the_current_values(tmp_path: Path) -> None:
    run, what = RunDir(tmp_path / "run"), trainable()
    run.path.mkdir()
    save_config(Config(), run.config)
    saver = Saver(run, what)
    before = what.model.weight.detach().clone()
    saver.save(1, {"metrics": {}, "mine": [1, None]})
    rate, moment = what.schedule.get_last_lr(), what.optimizer.state[what.model.weight]["exp_avg"].clone()
    random_number = torch.rand(1)
    what.optimizer.step()  # training goes on at once
    what.schedule.step()
    assert not torch.equal(what.model.weight, before)
    saver.close()
    loaded: list[torch.Tensor] = []
    other = trainable()
    other = replace(other, after_load=lambda: loaded.append(other.optimizer.state[other.model.weight]["exp_avg"]))
    state = load(store.find(run.checkpoints)[0].path, other)
    assert torch.equal(other.model.weight, before)
    assert [torch.equal(loaded_moment, moment) for loaded_moment in loaded] == [True]
    assert state["mine"] == [1, None]
    assert other.schedule.get_last_lr() == rate
    assert torch.equal(other.optimizer.state[other.model.weight]["exp_avg"], moment)
    assert torch.equal(torch.rand(1), random_number)  # the generators go on too


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_moments_start_anew_without_optimizer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, what = RunDir(tmp_path / "run"), trainable()
    run.path.mkdir()
    save_config(Config(), run.config)
    saver = Saver(run, what, save_optimizer=False)
    saver.save(1, {"metrics": {}})
    saver.close()
    load(store.find(run.checkpoints)[0].path, trainable())
    assert "AdamW's moments start anew" in caplog.text
