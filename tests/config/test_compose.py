"""Composing: every YAML, and every mistake that Hydra alone accepts or reports one at a time."""

from pathlib import Path

import pytest

from distill_cli.config.checks import config_problems, inert_overrides
from distill_cli.config.choices import conf_dir, group_choices, groups
from distill_cli.config.compose import compose
from distill_cli.config.derived import needs_sampler, validates
from distill_cli.config.fields import LIMITS, declared_keys
from distill_cli.config.schema import Config
from distill_cli.config.variation import RENAMED, load_config, override, save_config
from distill_cli.errors import ConfigError
from distill_cli.track.base import enabled
from distill_cli.verbs.ls import first_comment

JSONL_PATHS = ["data.train.path=a.jsonl", "data.validation.path=b.jsonl"]
CHOICES = [(g, c) for g in groups([conf_dir()]) for c in group_choices(g, [conf_dir()])]


def problems_of(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(argv)
    return list(caught.value.problems)


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_passes_the_checks(group: str, choice: str) -> None:
    argv = [f"{group}={choice}"]
    if choice == "prompts":
        argv += JSONL_PATHS[:1]
    if choice in ("jsonl", "table") or (group == "model" and choice != "tiny"):
        argv += JSONL_PATHS
    if (group, choice) == ("model", "custom"):
        argv += ["model.student.path=a", "model.teacher.path=b"]
    if group == "rollout":  # answers of 7,168 tokens need the micro-batches that go with them
        argv.append("train=default")
    if (group, choice) == ("loss", "reward"):  # compares the answers to a prompt
        argv.append("rollout.generations_per_prompt=2")
    if (group, choice) == ("loss", "sft"):  # learns from answers that the student does not write
        argv.append("rollout.on_policy_fraction=0")
    (job,) = compose(argv)
    assert job.choices[group] == choice
    assert config_problems(job.config) == []


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_opens_with_comment(group: str, choice: str) -> None:
    assert len(first_comment(conf_dir() / group / f"{choice}.yaml")) > 5


def test_model_choice_brings_its_recipe() -> None:
    (tiny,) = compose([])
    (qwen,) = compose(["model=qwen3_1.7b_4b", *JSONL_PATHS])
    assert tiny.config.model.student.path == "package://tiny_pair/student"
    assert tiny.config.data.train["source"] == "arithmetic"
    assert qwen.config.train.lr == 2e-5
    assert qwen.config.rollout.prompts_per_step == 128


def test_keys_beat_the_model_choice() -> None:
    (job,) = compose(["data=jsonl", *JSONL_PATHS, "train.lr=0.5"])
    assert job.config.data.train["source"] == "jsonl"
    assert job.config.train.lr == 0.5


def test_sweep_is_a_job_per_combination() -> None:
    jobs = compose(["loss.topk=8,16", "loss.kl_weight=0.3,0.5", "train.seed=7"], ["--multirun"])
    assert [job.swept for job in jobs] == [
        [f"loss.topk={topk}", f"loss.kl_weight={weight}"] for topk in (8, 16) for weight in (0.3, 0.5)
    ]
    assert [(job.config.loss.topk, job.config.train.seed) for job in jobs] == [(8, 7), (8, 7), (16, 7), (16, 7)]


def test_composing_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compose([])
    compose(["train.seed=1,2"], ["--multirun"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("loss.topkk=3", "loss.topkk: unknown key; did you mean loss.topk?"),
        ("+loss.zz=1", "loss.zz: unknown key"),
        ("train.warmup_steps=5", "train.warmup_steps: is now train.warmup_updates"),
        ("+train.max_bad_steps=5", "train.max_bad_steps: is now train.max_bad_updates"),
        ("topk=3", "did you mean loss.topk?"),
        ("train.lr=abc", "could not be converted to Float"),
        ("loss.topk=3.5", "could not be converted to Integer"),
        ("train.precision=bf17", "expected one of [bf16, fp32]"),
        ("loss=mixd", "did you mean mixed?"),
        ("loss=mixd", "(loss has: forward, gold, jsd, l1, mixed, no_teacher, policy_gradient, reverse, reward, "),
        ("~loss.topk", "keys cannot be removed"),
        ("a b", "not an override"),
        ("data=jsonl", "data.train.path: a value is needed"),
        ("loss=null", "loss=None: no such choice"),
        ("experiment=null", "experiment=None: no such choice"),
        ("tracker=wanb", "tracker=wanb: no such choice; did you mean wandb?"),
        ("tracker=[mlflow,wanb]", "tracker=wanb: no such choice; did you mean wandb?"),
        ("tracker=[[mlflow]]", "tracker=['mlflow']: "),
        ("+tracker=wandb", "several are chosen by a list"),
        ("tracker=mlflow,wandb", "write a list, as in tracker=[mlflow,wandb]"),
        ("loss=[mixed,reverse]", "loss=['mixed', 'reverse']: "),
    ],
)
def test_mistake_is_named(override: str, problem: str) -> None:
    assert any(problem in line for line in problems_of(override))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["mlflow"]),
        (["tracker=wandb"], ["wandb"]),
        (["tracker=none"], []),
        (["tracker=[]"], []),
        (["tracker=[wandb,mlflow]"], ["mlflow", "wandb"]),
        (["tracker=['tensorboard']", "tracker.wandb.enabled=true"], ["wandb", "tensorboard"]),
        (["tracker=[mlflow,wandb,tensorboard]", "tracker.mlflow.enabled=false"], ["wandb", "tensorboard"]),
    ],
)
def test_several_trackers_are_a_list(words: list[str], names: list[str]) -> None:
    (job,) = compose(words)
    assert list(enabled(job.config)) == names
    assert list(enabled(override(compose(["tracker=tensorboard"])[0].config, ["tracker=mlflow", *words]))) == names


def test_nothing_is_set_below_null() -> None:
    (problem,) = problems_of("data.validation=null", "data.validation.path=a")
    assert problem == "data.validation.path=a: data.validation is null; leave data.validation=null out"


def test_null_turns_validation_off() -> None:
    (job,) = compose(["data.validation=null", "data.verifier=null"])
    assert config_problems(job.config) == []
    assert not validates(job.config)
    assert needs_sampler(job.config)


def test_dictionary_takes_further_keys() -> None:
    (job,) = compose(["model.chat_template_kwargs={enable_thinking: false}", "data.train={limit: 9}"])
    assert job.config.model.chat_template_kwargs == {"enable_thinking": False}
    assert job.config.data.train["limit"] == 9
    assert override(job.config, ["model.chat_template_kwargs={a: 1}"]).model.chat_template_kwargs["a"] == 1


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_old_key_names_the_new(old: str, new: str) -> None:
    assert problems_of(f"{old}=1") == [f"{old}: is now {new}"]
    assert new in declared_keys(Config)


def test_old_key_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "cluster").mkdir()
    (tmp_path / "cluster/mine.yaml").write_text("launcher: slurm\npartition: gpu\n")
    with pytest.raises(ConfigError) as caught:
        compose(["cluster=mine"], ["--config-dir", str(tmp_path)])
    (problem,) = caught.value.problems
    assert problem.endswith("cluster.slurm.partition")
    assert problems_of("+cluster.extra.comment=x") == ["cluster.extra.comment: is now cluster.slurm.extra.comment"]


def test_all_mistakes_are_named_at_once() -> None:
    assert len(problems_of("loss.topkk=3", "train.lr=abc", "loss=foo", "train.seed=1,x")) == 4


def test_own_parameters_are_named_kwargs() -> None:
    (problem,) = problems_of("+loss.alpha=0.3")
    assert "loss.kwargs.alpha" in problem


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("loss.kl_weight=1.5", "loss.kl_weight=1.5: must lie in 0..1"),
        ("loss=skew_reverse loss.skew=-0.1", "loss.skew"),
        ("loss.kl_type=forwrad", "loss.kl_type=forwrad"),
        ("loss.kwargs.alpha=1", "loss.kl_type=mixed has kl_weight"),
        ("loss=forward loss.kwargs.alpha=1", "loss.kl_type=forward has no parameters"),
        ("loss.topk=0", "loss.topk=0: must be at least 1"),
        ("loss=sft", "loss.likelihood=1.0: is of tokens that the student did not write"),
        ("loss=sft rollout.on_policy_fraction=0 loss.temperature=2", "loss.likelihood=1.0: sampled tokens have no"),
        ("loss.temperature=0", "loss.temperature=0.0: must be above 0"),
        ("loss.temperature=nan", "loss.temperature"),
        ("data.max_prompt_tokens=65", "data.max_prompt_tokens=65"),
        ("rollout.max_new_tokens=128", "rollout.max_sequence_length=128"),
        ("rollout.top_k=0", "rollout.top_k=0: "),
        ("rollout.top_p=0", "rollout.top_p=0.0: must be above 0 and at most 1"),
        ("rollout.top_p=1.5", "rollout.top_p=1.5: must be above 0 and at most 1"),
        ("rollout.temperature=2.5", "rollout.temperature=2.5: must be at least 0 and at most 2"),
        ("train.global_batch_size=48", "train.global_batch_size=48: must divide the 64"),
        ("train.micro_batch_tokens=100", "train.micro_batch_tokens=100: must be at least rollout.max_sequence_length"),
        ("train.betas=[0.9]", "train.betas=[0.9]"),
        ("train.lr=0", "train.lr=0.0: must be above 0"),
        ("train.lr=inf", "train.lr=inf"),
        ("data.prompt_template=hello", "must contain {question}"),
        ("cluster.nodes=0", "cluster.nodes=0"),
        ("engine.teacher.max_model_len=100", "engine.teacher.max_model_len=100: sequences have up to 128"),
        ("run.print_every=0", "run.print_every=0"),
        ("train.seed=4294967296", "at least 0 and below 4294967296"),
        ("+engine.teacher.kwargs.enable_prefix_caching=true", "engine.teacher.kwargs.enable_prefix_caching"),
        ("loss.tail=renormalize loss.topk=1", "loss.topk=1: "),
        ("loss=jsd loss.kl_weight=1", "loss.kl_weight=1.0: must lie in 0..1, 0 and 1 excluded"),
        ("loss=skew_forward loss.skew=1", "loss.skew=1.0: must lie in 0..1, 1 excluded"),
        ("engine.student.kv_cache_gib=0", "engine.student.kv_cache_gib"),
        ("engine.student.gpu_memory_utilization=1.5", "gpu_memory_utilization"),
        ("mesh.tensor=0", "mesh.tensor=0: must be at least 1"),
        ("mesh.sequence_parallel=true", "mesh.sequence_parallel=true: "),
        ("mesh.tensor=2 train.compile=true", "train.compile=true: "),
    ],
)
def test_impossible_value_is_refused(override: str, problem: str) -> None:
    (job,) = compose(override.split(" "))
    assert any(problem in line for line in config_problems(job.config))


def test_defaults_lie_within_their_limits() -> None:
    limits = [key for key, metadata in declared_keys(Config).items() if metadata.keys() & LIMITS.keys()]
    assert len(limits) > 40
    assert not any(line.startswith(tuple(limits)) for line in config_problems(Config()))


def test_parameters_of_other_divergences_warn() -> None:
    unread, read = compose(["loss=forward,mixed", "loss.kl_weight=0.3"], ["--multirun"])
    (warning,) = inert_overrides(unread.config, unread.overrides)
    assert warning == "loss.kl_weight has no effect with loss.kl_type=forward: it is a parameter of mixed and jsd"
    assert inert_overrides(read.config, read.overrides) == []
    assert (unread.config.loss.parameters, read.config.loss.parameters) == ({}, {"kl_weight": 0.3})


def test_kl_type_alone_takes_its_defaults() -> None:
    (job,) = compose(["loss.kl_type=skew_forward"])
    assert config_problems(job.config) == []
    assert job.config.loss.parameters == {}  # null: the function's own
    assert override(job.config, ["loss.skew=0.4"]).loss.parameters == {"skew": 0.4}


def test_own_divergence_takes_kwargs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_terms.py").write_text(
        "from typing import Annotated\n"
        "from distill_cli.losses.divergence import Range\n"
        "def power(logp, logq, *, alpha: Annotated[float, Range(0, 2)], kl_weight=1.0): return alpha * logp\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = "loss.kl_type=own_terms:power"
    (job,) = compose([own, "loss.kwargs.alpha=0.3", "loss.kl_weight=0.2"])
    assert config_problems(job.config) == inert_overrides(job.config, job.overrides) == []
    assert (job.config.loss.parameters, job.config.loss.kwargs) == ({"kl_weight": 0.2}, {"alpha": 0.3})
    for typed, problem in (
        ([], "loss.kwargs.alpha: a value is needed"),
        (["loss.kwargs={alpha: 3}"], "loss.kwargs.alpha=3: must lie in 0..2"),
        (["loss.kwargs={alpha: 1, beta: 1}"], f"loss.kwargs.beta: {own} has alpha, kl_weight"),
        (["loss.kwargs={alpha: 1, kl_weight: 1}"], "loss.kwargs.kl_weight: set loss.kl_weight"),
    ):
        (line,) = config_problems(compose([own, *typed])[0].config)
        assert line.startswith(problem)


def test_config_survives_its_file(tmp_path: Path) -> None:
    (job,) = compose(["loss.topk=7", "train.schedule=linear", "data.prompt_template='a: {question}'"])
    save_config(job.config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == job.config


def test_renamed_keys_name_known_ones() -> None:
    known = declared_keys(Config).keys()
    assert not RENAMED.keys() & known
    assert set(RENAMED.values()) <= known
