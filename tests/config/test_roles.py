"""Which ranks train, sample and score (`cluster.roles`): what is refused, and who does what."""

from collections.abc import Sequence

import pytest

from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.compose import compose
from distill_cli.config.derived import num_sampling_ranks, scores_while_sampling, scoring_ranks
from distill_cli.config.layout_checks import mesh_problems
from distill_cli.config.schema import Config
from distill_cli.jobs.preflight import preflight
from distill_cli.jobs.run_panels import roles_row, step_row

SPLIT = "cluster.roles=split"


def config_of(*overrides: str) -> Config:
    (job,) = compose(overrides)
    return job.config


def all_problems(config: Config, *, ranks: int) -> Sequence[str]:
    return [*config_problems(config), *mesh_problems(config, ranks_per_node=ranks)]


@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        ([], 1, "cluster.roles=split: 1 of 1 ranks sample or score, and none is left to train"),
        (["engine.student.ranks=2", "engine.teacher.ranks=2"], 4, "4 of 4 ranks sample or score"),
        (["engine.student.ranks=0"], 2, "engine.student.ranks=0: with cluster.roles=split some ranks sample"),
        (["engine.student.ranks=-1"], 2, "engine.student.ranks=-1: must be at least 0"),
        (["engine.teacher.ranks=3", "engine.teacher.tensor_parallel=2"], 8, "engine.teacher.ranks=3: each engine has"),
        (["engine.student.ranks=3", "engine.student.tensor_parallel=2"], 8, "engine.student.ranks=3: each engine has"),
        (["mesh.tensor=2"], 4, "product 2 must divide the 3 ranks that train; make it one of 1, 3"),
        (["rollout.guard_above=0.5"], 2, "rollout.guard_above=0.5: the ranks that sample have no teacher"),
        (["rollout.on_policy_fraction=0.5", "rollout.off_policy=teacher"], 2, "rollout.off_policy=teacher: the ranks"),
        (["model.teacher.path=student"], 2, "model.teacher.path=student: the student's engine is on other ranks"),
        (["rollout.score_while_sampling=true"], 2, "rollout.score_while_sampling=true: other ranks sample"),
        (
            ["cluster.nodes=2", "engine.student.ranks=2", "engine.student.tensor_parallel=2", "engine.teacher.ranks=1"],
            2,
            "engine.student.ranks=2: an engine of 2 ranks would span two nodes of 2",
        ),
    ],
)
def test_impossible_roles_are_refused(overrides: list[str], ranks: int, message: str) -> None:
    found = all_problems(config_of(SPLIT, *overrides), ranks=ranks)
    assert any(message in line for line in found), found


def test_possible_roles_are_taken() -> None:
    assert all_problems(config_of(SPLIT), ranks=2) == []
    dataset = ("rollout.on_policy_fraction=0.5", "rollout.off_policy=dataset", "data.train.path=x")
    assert not any("roles" in line for line in all_problems(config_of(SPLIT, *dataset), ranks=2))
    large = ("engine.student.ranks=4", "engine.student.tensor_parallel=2", "engine.teacher.ranks=2", "mesh.tensor=2")
    assert all_problems(config_of(SPLIT, *large), ranks=8) == []


def test_default_roles_share_all() -> None:
    config = config_of("engine.student.ranks=2")
    assert num_sampling_ranks(config) == 0
    assert scoring_ranks(config) == {"teacher": 0}
    typed = ["engine.student.ranks=2", "engine.teacher.ranks=1"]
    assert len([line for line in inert_overrides(config_of(*typed), typed) if "cluster.roles=shared" in line]) == 2
    split = config_of(SPLIT, "engine.student.tensor_parallel=2")
    assert num_sampling_ranks(split) == 2
    assert not scores_while_sampling(split, on_gpus=True)
    assert num_sampling_ranks(config_of(SPLIT, "rollout.replay=runs/x")) == 0


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([], "ranks 0 train and score, 1 sample: in turn, as rollout.staleness is 0"),
        (["rollout.staleness=1"], "ranks 0 train and score, 1 sample: at the same time, 1 step ahead"),
        (
            ["cluster.ranks_per_node=4", "engine.teacher.ranks=1", "rollout.staleness=2"],
            "ranks 0 to 1 train, 2 sample, 3 score: at the same time, 2 steps ahead",
        ),
    ],
)
def test_a_plan_names_the_roles(overrides: list[str], text: str) -> None:
    assert roles_row(preflight(config_of(SPLIT, *overrides))) == {"roles": text}
    assert roles_row(preflight(config_of())) == {}


def test_a_panel_says_what_a_step_samples() -> None:
    assert step_row(config_of()) == "64 prompts"
    assert step_row(config_of("rollout.staleness=1")) == "64 prompts, sampled 1 step before"
    carried = config_of("rollout.carry_over=true", "rollout.staleness=2")
    assert step_row(carried) == "1,024 tokens, about 16 of each of 64 answers, sampled 2 steps before"


def test_epochs_do_not_count_steps_of_slots() -> None:
    rows = ("data.train.size=128", "train.max_epochs=2", "train.max_steps=50")
    assert preflight(config_of(*rows)).num_steps == 4
    assert preflight(config_of(*rows, "rollout.carry_over=true")).num_steps == 50


def test_memory_is_that_of_a_rank_that_trains() -> None:
    shared, split = preflight(config_of()), preflight(config_of(SPLIT))
    assert {"sampler", "scorer"} <= shared.memory.parts.keys()
    assert "sampler" not in split.memory.parts
    apart = preflight(config_of(SPLIT, "engine.teacher.ranks=1", "cluster.ranks_per_node=3"))
    assert "scorer" not in apart.memory.parts


def test_stale_policy_gradients_are_warned_of() -> None:
    def warnings(*overrides: str) -> list[str]:
        return [line for line in preflight(config_of(*overrides)).warnings if "rollout.staleness" in line]

    (line,) = warnings("loss=policy_gradient", "rollout.staleness=1")
    assert "loss.policy_gradient may diverge" in line
    assert warnings("loss=reverse", "rollout.staleness=1") == warnings("loss=policy_gradient") == []
