"""Training resumes from a checkpoint as if never interrupted, on the same number of ranks and on others."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from distill_cli.checkpoint import store
from distill_cli.checkpoint.hf_export import trained
from distill_cli.config.schema import Config
from distill_cli.config.variation import save_config
from distill_cli.folders import atomic_dir
from distill_cli.student import attention
from distill_cli.student.safetensors_writer import write_weights
from tests.student.layouts import Layout, Outcome, train
from tests.student.train_rank import made_up_model

pytestmark = pytest.mark.slow

ONE = Layout(lengths="ragged")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """1 -> 2 -> 4 -> 1 ranks, and tensor=2 -> shard=2; each leaves a checkpoint after one more step. Adapters too."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "two", "four", "end", "tensor", "adapters")}
    for folder in folders.values():
        save_config(Config(), folder / "config.yaml")
    one = replace(ONE, save_to=str(folders["one"]), save_at=1)
    two = Layout(ranks=2, start_from=f"{folders['one']}/checkpoints/step_1", save_to=str(folders["two"]), save_at=2)
    tensor = Layout(ranks=2, tensor=2, save_to=str(folders["tensor"]), save_at=2)
    four = Layout(
        ranks=4, tensor=2, start_from=f"{folders['two']}/checkpoints/step_2", save_to=str(folders["four"]), save_at=3
    )
    end = replace(four, save_to=str(folders["end"]), save_at=5)
    layouts = {
        "one": one,
        "one again": replace(ONE, start_from=f"{folders['one']}/checkpoints/step_1"),
        "two": two,
        "two again": Layout(ranks=2, start_from=f"{folders['two']}/checkpoints/step_2"),
        "tensor": tensor,
        "tensor to shard": Layout(ranks=2, start_from=f"{folders['tensor']}/checkpoints/step_2"),
        "adapters": Layout(ranks=2, tensor=2, lora=3, save_to=str(folders["adapters"]), save_at=2),
        "adapters again": Layout(ranks=2, tensor=2, lora=3, start_from=f"{folders['adapters']}/checkpoints/step_2"),
        "four": four,
        "end": end,
        "four to one": replace(ONE, start_from=f"{folders['four']}/checkpoints/step_3"),
    }
    last = layouts["four to one"]
    results = train(layout for layout in layouts.values() if layout != last) | train([last])
    outcomes = {name: results[layout] for name, layout in layouts.items()}
    named = {"folder": folders["two"], "folder of end": folders["end"], "adapters' folder": folders["adapters"]}
    return outcomes | named


def test_same_ranks_continue_bit_for_bit(outcomes: dict[str, Outcome]) -> None:
    for whole, rest in (("one", "one again"), ("two", "two again"), ("adapters", "adapters again")):
        steps = len(outcomes[rest].losses)
        assert 0 < steps < 5
        assert outcomes[rest].losses == outcomes[whole].losses[-steps:]
        for name, param in outcomes[whole].params.items():
            assert torch.equal(param, outcomes[rest].params[name]), name


@pytest.mark.parametrize("name", ["two", "four", "four to one", "tensor to shard"])
def test_other_ranks_continue_like_one(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome, whole = outcomes[name], outcomes["one"]
    steps = len(outcome.losses)
    rest = Outcome(whole.losses[-steps:], whole.grad_norms[-steps:], whole.params)
    assert max(outcome.difference(rest).values()) < 1e-5


def test_a_checkpoint_is_safetensors_and_json(outcomes: dict[str, Outcome]) -> None:
    (checkpoint,) = store.find(outcomes["folder"] / "checkpoints")
    assert atomic_dir.damage(checkpoint.path) is None
    assert {file.suffix for file in checkpoint.path.iterdir()} == {".safetensors", ".json", ".yaml"}
    assert checkpoint.metric("train/loss") == outcomes["two"].losses[0]
    weights = sorted(checkpoint.path.glob("shard-*-model-00001-of-00002.safetensors"))
    assert len(weights) == 2  # one a rank
    with safe_open(weights[0], framework="pt") as file:
        assert "model.norm.weight" in set(file.keys())
        assert not any(name.startswith("exp_avg") for name in file.keys())  # noqa: SIM118


def test_checkpoints_omit_frozen_weights(outcomes: dict[str, Outcome]) -> None:
    (checkpoint,) = store.find(outcomes["adapters' folder"] / "checkpoints")
    for file in checkpoint.path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            assert all(".lora_" in name for name in content.keys())  # noqa: SIM118
    names = {name.removeprefix("lm.") for name in outcomes["adapters"].params if ".lora_" in name}
    assert names == trained(checkpoint).shapes.keys()


def test_one_process_exports_four_ranks(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    (checkpoint,) = store.find(outcomes["folder of end"] / "checkpoints")
    write_weights(trained(checkpoint), tmp_path, dtype=torch.float32, max_file_bytes=20_000)
    attention.register()
    model = made_up_model("qwen3", tied=True)
    model.config.save_pretrained(tmp_path)
    params = {name.removeprefix("lm."): param for name, param in outcomes["end"].params.items()}
    loaded = model.load_state_dict(params, strict=False)
    assert (loaded.missing_keys, loaded.unexpected_keys) == (["lm_head.weight"], [])  # which is tied
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 20_000 + 4_000 for file in files)  # with the header
    ids = torch.arange(40)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")(ids).logits
        model.set_attn_implementation("eager")
        theirs = model(ids).logits
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.exhaustive
def test_a_planted_pickle_is_ignored(outcomes: dict[str, Outcome], tmp_path: Path) -> None:
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (checkpoint,) = store.find(outcomes["folder"] / "checkpoints")
    for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
        (checkpoint.path / name).write_bytes(pickle.dumps(Planted()))
    try:
        train([Layout(ranks=2, start_from=str(checkpoint.path))])
    finally:
        for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
            (checkpoint.path / name).unlink()
    assert not (tmp_path / "ran").exists()


@pytest.mark.exhaustive
def test_another_models_checkpoint_is_refused(outcomes: dict[str, Outcome]) -> None:
    (checkpoint,) = store.find(outcomes["folder"] / "checkpoints")
    with pytest.raises(AssertionError, match="is of another model: model.layers.0"):
        train([Layout(family="gemma3_text", start_from=str(checkpoint.path))])


def test_state_holds_step_and_updates(outcomes: dict[str, Outcome]) -> None:
    (checkpoint,) = store.find(outcomes["folder"] / "checkpoints")
    state = json.loads((checkpoint.path / "state.json").read_text())
    assert (state["step"], state["num_updates"], state["num_ranks"]) == (2, 2, 2)
