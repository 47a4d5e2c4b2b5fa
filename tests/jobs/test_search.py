"""What a search draws, how it learns, and which searches are refused."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from distill_cli.errors import ConfigError
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, write_json
from distill_cli.jobs import search as searches
from distill_cli.jobs.search import Search, distribution, draw, next_batch, study_of, write_results
from distill_cli.terminal.console import Console
from distill_cli.verbs.command_line import parser_of
from distill_cli.verbs.train import main

LR = "train.lr=tag(log,interval(1e-5,1e-1))"
TYPED = ("-m", LR, "loss.topk=4,8", "search.trials=6", "run.name=s")


def read_search(words: Sequence[str]) -> Search:
    """Return the search that `distill` with these words is."""
    typed = parser_of("train").parse(words)
    return searches.read_search(typed.overrides, typed.flags, command=["distill", *words])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "drawn_from"),
    [
        ("train.lr=interval(1e-5,1e-3)", FloatDistribution(1e-5, 1e-3)),
        ("train.lr=interval(0,1)", FloatDistribution(0, 1)),
        ("train.lr=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
        ("train.lr=range(0.1,0.8,0.2)", FloatDistribution(0.1, 0.7, step=0.2)),
        ("loss.topk=interval(8,64)", IntDistribution(8, 64)),
        ("loss.topk=tag(log,interval(8,64))", IntDistribution(8, 64, log=True)),
        ("model.student.lora.rank=interval(1,8)", IntDistribution(1, 8)),
        ("data.train.limit=interval(1,8)", FloatDistribution(1, 8)),
        ("data.train.limit=int(interval(1,8))", IntDistribution(1, 8)),
        ("loss.topk=range(8,65,8)", IntDistribution(8, 64, step=8)),
        ("loss.topk=range(64,7,-8)", IntDistribution(8, 64, step=8)),
        ("loss.topk=64,32", CategoricalDistribution(["32", "64"])),
        ("loss.topk=shuffle(32,64)", CategoricalDistribution(["32", "64"])),
        ("loss=choice(reverse,forward)", CategoricalDistribution(["forward", "reverse"])),
        ("train.compile=true,false", CategoricalDistribution(["False", "True"])),
    ],
)
def test_a_range_becomes_a_distribution(typed: str, drawn_from: BaseDistribution) -> None:
    assert distribution(OverridesParser.create().parse_override(typed)) == drawn_from


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ((LR,), "-m"),
        (("-m",), "nothing is searched"),
        (("-m", LR, "search.trials=0"), "search.trials=0: must be at least 1"),
        (("-m", LR, "search.sampler=nope"), "search.sampler=nope"),
        (("-m", LR, "loss.tpk=3"), "did you mean loss.topk?"),
        (("-m", "loss.topk=interval(0.5,3)"), "loss.topk=0.5"),
        (("-m", "loss.tail=interval(0,1)"), "loss.tail=0"),
        (("-m", "loss.topk=interval(9,3)"), "low=9, high=3"),
        (("-m", "loss.topk=range(9,3)"), "is empty"),
        (("-m", "train.lr=interval(0,inf)"), "has no end"),
        (("-m", "train.lr=tag(log,interval(0,1))"), "low=0.0"),
        (("-m", "train.lr=tag(lg,interval(1,2))"), "the one tag is log"),
        (("-m", "loss.topk=tag(log,choice(4,8))"), "the one tag is log"),
        (("-m", "loss=glob(*)"), "name the choices"),
        (("-m", LR, "cluster.nodes=1,2"), "cluster.nodes=1,2: trials of a search share this section"),
        (("-m", LR, "search.seed=1,2"), "search.seed=1,2: trials"),
        (("-m", LR, "eval.at_end=false", "eval.period=0"), "checkpoint.metric=val/accuracy: decides"),
        (("-m", "loss.kl_weight=interval(2.0,3.0)"), "must lie in 0..1"),
    ],
)
def test_what_cannot_be_searched_is_refused(folder: Path, argv: Sequence[str], problem: str) -> None:
    arguments = parser_of("train").parse(["search.trials=2", *argv])
    arguments.command = ["distill"]
    with pytest.raises(ConfigError) as error:
        main(arguments)
    assert problem in " ".join(error.value.problems)
    assert list(folder.iterdir()) == []


def finish(run: RunDir, accuracy: float | None) -> None:
    """Leave what a run leaves that reached an accuracy, or that failed."""
    run.path.mkdir(parents=True, exist_ok=True)
    if accuracy is not None:
        run.metrics.write_text(json.dumps({"step": 1, "val/accuracy": accuracy}) + "\n")
        write_json(run.outcome, {"state": "finished"})


def by_lr(drawn: dict[str, Any]) -> float:
    return -abs(drawn["train.lr"] - 1e-3)


def search(spec: Search, sweep: SweepDir, reach: Callable[[dict[str, Any]], float | None], batches: int = 99) -> None:
    """Draw batches and let each trial reach what `reach` makes of its values, without composing or training."""
    elements = sweep.elements() if sweep.file.is_file() else []
    while batches and (drawn := draw(spec, sweep)):
        for values in drawn:
            overrides = [f"{key}={value}" for key, value in values.items()]
            elements.append(Element(len(elements), f"trial_{len(elements)}", overrides))
            finish(RunDir(sweep.path / elements[-1].folder), reach(values))
        sweep.write(command=[], elements=elements)
        batches -= 1


def test_same_command_makes_same_trials(folder: Path) -> None:
    spec, seeded = read_search(TYPED), read_search([*TYPED, "search.seed=1"])
    sweeps = {name: SweepDir(folder / name) for name in ("one", "other", "seeded")}
    search(spec, sweeps["one"], by_lr)
    search(spec, sweeps["other"], by_lr, batches=2)
    search(read_search(TYPED), sweeps["other"], by_lr)  # as `resume` continues it
    search(seeded, sweeps["seeded"], by_lr)
    one, other, seeded = ([element.overrides for element in sweep.elements()] for sweep in sweeps.values())
    assert (len(one), one) == (6, other)
    assert not [overrides for overrides in one if overrides in seeded]


def test_a_trial_runs_its_values(folder: Path) -> None:
    sweep = SweepDir(folder / "s")
    spec = read_search([*TYPED, "cluster.parallel_jobs=2", "search.sampler=random", "search.trials=3"])
    assert len(next_batch(spec, sweep, console=Console(file=io.StringIO()))) == 2
    assert len(draw(spec, sweep)) == 1
    for element in sweep.elements():
        drawn = dict(override.split("=") for override in element.overrides)
        config = RunDir(sweep.path / element.folder).config.read_text()
        assert list(drawn) == ["train.lr", "loss.topk"]
        assert f"lr: {float(drawn['train.lr'])}\n" in config
        assert f"topk: {drawn['loss.topk']}\n" in config
        assert len(drawn["train.lr"]) <= len("1.23456e-05")
        assert "trials: null" in config
    assert sweep.space() == {"train.lr": LR.partition("=")[2], "loss.topk": "4,8"}


def test_a_failed_trial_counts_as_failed(folder: Path) -> None:
    sweep, spec = SweepDir(folder / "s"), read_search(TYPED)
    search(spec, sweep, lambda drawn: None if drawn["loss.topk"] == "4" else by_lr(drawn))
    failed = [element.overrides[1] == "loss.topk=4" for element in sweep.elements()]
    trials = study_of(spec, sweep).trials
    assert [trial.state is TrialState.FAIL for trial in trials] == failed
    assert [trial.value is None for trial in trials] == failed
    assert 0 < sum(failed) < 6


@pytest.mark.parametrize(("higher_is_better", "best"), [("true", max), ("false", min)])
def test_results_name_the_best_trial(folder: Path, higher_is_better: str, best: Callable) -> None:
    spec = read_search([*TYPED, f"checkpoint.higher_is_better={higher_is_better}"])
    sweep = SweepDir(folder / "s")
    values = iter([0.5, None, 0.75, 0.25, float("nan"), 0.5])
    search(spec, sweep, lambda drawn: next(values))
    found = write_results(spec, sweep)
    written = json.loads((sweep.path / "search.json").read_text())
    assert [trial["value"] for trial in written["trials"]] == [0.5, None, 0.75, 0.25, None, 0.5]
    assert found == written["best"] == written["trials"][2 if best is max else 3]
    assert (written["metric"], found["run"]) == ("val/accuracy", sweep.elements()[2 if best is max else 3].folder)


def test_later_trials_come_near_the_best(folder: Path) -> None:
    sweep, spec = SweepDir(folder / "s"), read_search([*TYPED, "search.trials=25", "cluster.parallel_jobs=5"])
    search(spec, sweep, by_lr)
    distances = [abs(float(element.overrides[0].partition("=")[2]) - 1e-3) for element in sweep.elements()]
    assert sum(distances[-10:]) < sum(distances[:10])
