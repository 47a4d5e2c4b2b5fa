"""Hydra's launchers and sweepers: which work here, and what is said of the others before anything starts."""

from pathlib import Path

import pytest

from distill_cli.cli import run
from distill_cli.config.compose import compose, hydra_plugins
from distill_cli.config.schema import Launcher
from distill_cli.errors import ConfigError
from distill_cli.jobs import hydra_sweep
from distill_cli.jobs.hydra_sweep import check_plugins, direction, launcher_parameters, lay_over

LAUNCHER = "hydra/launcher=submitit_slurm"
SWEEPER = "hydra/sweeper=optuna"
WEIGHT = "loss.kl_weight=interval(0.1,0.9)"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (
            ["-m", "hydra/launcher=joblib"],
            "hydra/launcher=joblib: distill works with hydra/launcher=submitit_slurm alone",
        ),
        (["-m", "hydra/launcher=submitit_local"], "cluster.parallel_jobs=N"),
        (["-m", "hydra/sweeper=ax"], "distill works with hydra/sweeper=optuna alone"),
        ([LAUNCHER], "is for sweeps; add -m, or type cluster=slurm"),
        ([SWEEPER], "is for sweeps; add -m"),
        (["-m", SWEEPER, WEIGHT, "loss.tpk=3"], "loss.tpk: unknown key; did you mean loss.topk?"),
        (["-m", SWEEPER, WEIGHT, "eval.period=0", "eval.at_end=false"], "checkpoint.metric=val/accuracy: is what the"),
        (["-m", SWEEPER, WEIGHT, "hydra.sweeper.direction=minimize"], "checkpoint.higher_is_better=true; set that"),
        (["-m", SWEEPER, WEIGHT, "hydra.sweeper.n_trial=2"], "Key 'n_trial' not in 'OptunaSweeperConf'"),
        (["-m", SWEEPER, WEIGHT, "hydra.sweeper.storage=sqlite:///a.db"], "keeps no database with the SQLAlchemy 2"),
        (["-m", SWEEPER, "loss.kl_weight=interval(2.0,3.0)"], "must lie in 0..1"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, argv: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(argv) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_other_verbs_take_none() -> None:
    with pytest.raises(ConfigError, match="`distill train -m` takes it, no other verb"):
        compose([SWEEPER, WEIGHT], ["--multirun"])


def test_one_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {SWEEPER: ("hydra_plugins.no_such", "hydra-optuna-sweeper")}
    monkeypatch.setattr(hydra_sweep, "KNOWN", gone)
    with pytest.raises(ConfigError, match="needs hydra-optuna-sweeper, which is not installed; pip install"):
        check_plugins([SWEEPER], ["--multirun"], hydra_plugins([SWEEPER]))


def test_a_search_goes_by_the_metric_that_checkpoints_are_ranked_by() -> None:
    assert direction([SWEEPER, WEIGHT]) == "maximize"
    kl = ("checkpoint.metric=train/kl_forward", "checkpoint.higher_is_better=false", "eval.at_end=false")
    assert direction([SWEEPER, WEIGHT, *kl]) == "minimize"


PARAMS = {
    "partition": "gpu", "timeout_min": 60, "gpus_per_node": 2, "cpus_per_task": 6, "mem_gb": 20, "gres": "gpu:a:2",
    "signal_delay_s": 90, "additional_parameters": {"reservation": "mine"}, "setup": ["module load x"],
    "array_parallelism": 256, "nodes": 1, "tasks_per_node": 1, "max_num_timeout": 0,
}  # fmt: skip


def test_what_was_typed_for_the_launcher_becomes_the_run_s_cluster_and_goes_back_to_it() -> None:
    (job,) = compose(["cluster.nodes=2", "cluster.array_parallelism=3", "cluster.qos=long"])
    cluster = job.config.cluster
    typed = set(PARAMS) - {"array_parallelism", "nodes", "tasks_per_node", "max_num_timeout", "timeout_min"}
    lay_over(cluster, PARAMS, typed=typed)
    assert (cluster.launcher, cluster.partition, cluster.time) == (Launcher.slurm, "gpu", "60")
    assert (cluster.mem, cluster.extra) == ("20G", {"reservation": "mine", "gres": "gpu:a:2"})
    given = launcher_parameters(job.config, name="s", max_jobs=4)
    assert given.items() >= {
        "partition": "gpu", "qos": "long", "nodes": 2, "array_parallelism": 3, "cpus_per_task": 6, "timeout_min": 60,
        "signal_delay_s": 90, "setup": ["module load x"], "tasks_per_node": 1, "gpus_per_node": None,
        "additional_parameters": {"reservation": "mine", "requeue": True, "mem": "20G"},
    }.items()  # fmt: skip


@pytest.mark.parametrize("key", ["tasks_per_node", "max_num_timeout", "submitit_folder"])
def test_what_distill_does_itself_is_no_key_of_the_launcher(key: str) -> None:
    (job,) = compose([])
    with pytest.raises(ConfigError, match=f"hydra.launcher.{key}: distill does this itself; "):
        lay_over(job.config.cluster, PARAMS, typed={key})
