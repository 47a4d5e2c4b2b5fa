"""One config made from another: as Hydra would compose it, and the keys that each verb may change."""

import dataclasses

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.fields import declared_keys, has_property
from distill_cli.config.schema import Config, Dtype
from distill_cli.config.variation import forbidden_changes, override, plain
from distill_cli.errors import ConfigError

CHOICES = [("cluster", "slurm"), ("cluster", "slurm_example"), ("data", "mix"), ("experiment", "quick")]
CHOICES += [("loss", "jsd"), ("model", "tiny"), ("model", "custom"), ("train", "default")]
FILLED = ["model.student.path=a", "model.teacher.path=b", "data.train.path=a.jsonl", "data.validation.path=b.jsonl"]


@pytest.fixture(scope="module")
def tiny() -> Config:
    return compose(["train.lr=0.5", "loss.topk=7", "eval.max_samples=9"])[0].config


def test_config_is_frozen(tiny: Config) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="TrainConfig.lr"):
        tiny.train.lr = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        del tiny.train.lr
    assert dataclasses.replace(tiny.train, lr=2.0).lr == 2.0


def test_override_takes_choices_first(tiny: Config) -> None:
    varied = override(tiny, ["eval.max_samples=3", "eval=default"])
    assert varied.eval.max_samples == 3
    assert varied.eval.batch_size == compose(["eval=default"])[0].config.eval.batch_size != tiny.eval.batch_size
    assert varied.train == tiny.train


def test_a_choice_keeps_what_was_typed(tiny: Config) -> None:
    chosen = override(
        tiny, ["loss=reverse", "loss.tail=zero"], typed=["loss.topk=7", "-m", "train.lr=0.5,1", "loss=jsd"]
    )
    assert (chosen.loss.topk, chosen.loss.kl_type, chosen.loss.tail.value) == (7, "reverse", "zero")
    assert override(tiny, ["loss=reverse"]).loss.topk == Config().loss.topk


def test_override_takes_values_by_key(tiny: Config) -> None:
    varied = override(tiny, {"model.student.dtype": Dtype.bfloat16, "data.train": {}})
    assert (varied.model.student.dtype, varied.data.train) == (Dtype.bfloat16, {})
    assert (tiny.model.student.dtype, bool(tiny.data.train)) == (Dtype.float32, True)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_choice_replaces_its_group(tiny: Config, group: str, choice: str) -> None:
    """A file's keys have the values that Hydra composes for it, those of files it inherits from included."""
    typed = [f"{group}={choice}", *FILLED]
    varied, composed = plain(override(tiny, typed)), plain(compose(typed)[0].config)
    if group not in ("model", "experiment"):
        assert {k: v for k, v in varied.items() if k.startswith(f"{group}.")} == {
            k: v for k, v in composed.items() if k.startswith(f"{group}.")
        }
    else:
        assert varied["train.lr"] == (composed["train.lr"] if choice == "tiny" else 0.5)


def test_site_file_overrides_a_run(tiny: Config) -> None:
    varied = override(tiny, ["cluster=slurm_example"])
    assert varied.cluster == compose(["cluster=slurm_example"])[0].config.cluster


def test_override_refuses_sweeps_and_mistakes(tiny: Config) -> None:
    for typed, problem in (
        ("loss.topk=1,2", "takes no sweep"),
        ("loss.topkk=1", "did you mean loss.topk?"),
        ("eval=none", "no such choice"),
        ("model=custom", "model.student.path: a value is needed"),
    ):
        with pytest.raises(ConfigError) as caught:
            override(tiny, [typed])
        assert problem in " ".join(caught.value.problems)


OTHER = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.25}


def flipped(config: Config, key: str) -> Config:
    """Return the config with another value of the same type at `key`."""
    section = config
    for part in key.split(".")[:-1]:
        section = getattr(section, part)
    value = getattr(section, key.rpartition(".")[2])
    kind = type(value)
    if isinstance(value, str) or value is None:
        return override(config, {key: "another"})
    if kind in OTHER:
        return override(config, {key: OTHER[kind](value)})
    if isinstance(value, list):
        return override(config, {key: [*value, *value, 1]})
    if isinstance(value, dict):
        return override(config, {key: {**value, "another": 1}})
    return override(config, {key: next(one for one in kind if one is not value)})


@pytest.mark.parametrize("verb", ["resume", "replay", "evaluation"])
def test_changed_keys_are_recorded_or_refused(tiny: Config, verb: str) -> None:
    before = plain(tiny)
    for key in declared_keys(Config):
        changed = flipped(tiny, key)
        assert any(before.get(one) != value for one, value in plain(changed).items()), key
        is_refused = [one for one, _, _ in forbidden_changes(tiny, changed, unless=verb)]
        assert bool(is_refused) != has_property(Config, key, verb), key


def test_properties_are_inherited_downwards() -> None:
    assert has_property(Config, "mesh.tensor", "resume")
    assert has_property(Config, "cluster.env.NAME", "evaluation")
    assert not has_property(Config, "model.student.lora.rank", "resume")
    assert has_property(Config, "model.student.lora.sync", "resume")
    assert has_property(Config, "rollout", "evaluation")
    assert not has_property(Config, "rollout.temperature", "evaluation")
    assert not has_property(Config, "no.such.key", "resume")
