"""What is read of a model's folder without torch."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill_cli.errors import ConfigError
from distill_cli.models import model_files
from distill_cli.models.model_files import ModelFiles

INDEX = "model.safetensors.index.json"


def test_headers_have_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert model_files.tensors(tmp_path) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


def test_other_files_are_no_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    assert list(model_files.shapes(tmp_path)) == ["a"]


@pytest.mark.parametrize("num_bytes", [0, 5, 60, 300])
def test_a_cut_file_is_refused(num_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, file)
    assert file.stat().st_size > 300
    os.truncate(file, num_bytes)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        model_files.tensors(tmp_path)


def test_expected_and_actual_bytes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, file)
    model_files.tensors(tmp_path)
    size = file.stat().st_size
    os.truncate(file, size - 4)
    with pytest.raises(ConfigError, match=f"is cut: its header describes {size} bytes, and the file has {size - 4}"):
        model_files.tensors(tmp_path)
    os.truncate(file, size + 4)
    with pytest.raises(ConfigError, match=f"is too long: .* {size} bytes, and the file has {size + 4}"):
        model_files.tensors(tmp_path)


def in_a_file(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<html>not found</html>", "no header's size"),
        (in_a_file(b"{not json"), "its header cannot be read"),
        (in_a_file(b"[1]"), "its header cannot be read"),
        (in_a_file(b'{"a": {"dtype": "F32"}}'), "its header cannot be read"),
        (in_a_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": []}}'), "its header cannot be read"),
    ],
)
def test_what_is_no_safetensors_file(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=why):
        model_files.tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (
            {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
            "1 of its 2 files are not there.* 2.safetensors",
        ),
        ({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}, "1 of its tensors are in no file, such as b"),
        ({"metadata": {}}, "no weight_map"),
        ({"weight_map": {"a": 1}}, "no weight_map"),
        ([], "must be an object"),
    ],
)
def test_a_damaged_index(index: object, why: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"{re.escape(INDEX)}: .*{why}"):
        model_files.tensors(tmp_path)


TWO = {"a": ("F32", [2], [0, 8]), "b": ("F32", [1], [8, 12])}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"b": ("F32", [2], [0, 8])}, r"b, F32 of shape \[2\], cannot be at bytes 0 to 8, after those to 8"),
        ({"a": ("F32", [2], [-5, 8])}, "a, F32 .* cannot be at bytes -5 to 8"),
        ({"a": ("F32", [3], [0, 8])}, r"a, F32 of shape \[3\], cannot be"),
        ({"a": ("F16", [2], [0, 8])}, r"a, F16 of shape \[2\], cannot be"),
        ({"b": ("F32", [1], [9, 13])}, "b, F32 .* after those to 8"),
        ({"a": ("F32", [-2], [0, 8])}, "its header cannot be read"),
        ({"a": ("F32", [1.5], [0, 8])}, "its header cannot be read"),
    ],
)
def test_a_header_that_contradicts_itself(
    changed: dict[str, tuple[str, list[int], list[int]]], why: str, tmp_path: Path
) -> None:
    entries = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": place}
        for name, (dtype, shape, place) in {**TWO, **changed}.items()
    }
    end = max(entry["data_offsets"][1] for entry in entries.values())
    (tmp_path / "model.safetensors").write_bytes(in_a_file(json.dumps(entries).encode()) + bytes(end))
    with pytest.raises(ConfigError, match=why):
        model_files.tensors(tmp_path)


def test_a_header_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(in_a_file(b"{}"))
    with pytest.raises(ConfigError, match="has no tensors"):
        model_files.tensors(tmp_path)


def test_a_file_of_several_is_missed_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(ConfigError, match="2 files belong together, and 1 are there"):
        model_files.tensors(tmp_path)


def test_a_link_into_a_cache_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ConfigError, match="model.safetensors: cannot be read"):
        model_files.tensors(tmp_path)


@pytest.mark.parametrize(
    ("file", "why"),
    [
        ("adapter_config.json", "holds adapters alone; give their base model with them merged"),
        ("model.Q4_K_M.gguf", r"holds a GGUF file; give the same model's \*.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "holds pickles, which are not loaded; load and save it with transformers"),
    ],
)
def test_folders_in_other_formats(file: str, why: str, make_model: Callable[..., Path]) -> None:
    folder = make_model("s")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / file).touch()
    with pytest.raises(ConfigError, match=f"model.student.path={folder}: {why}"):
        model_files.locate(str(folder), key="model.student.path")


@pytest.mark.parametrize(
    ("content", "why"),
    [("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("[" * 100_000, "not JSON")],
)
def test_a_config_that_is_no_json(content: str, why: str, make_model: Callable[..., Path]) -> None:
    folder = make_model("s")
    (folder / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"config.json: .*{why}"):
        model_files.locate(str(folder), key="model.student.path")


def test_vocabulary_size_of_the_weights(make_model: Callable[..., Path]) -> None:
    folder = make_model("s")
    (folder / "config.json").write_text('{"text_config": {"model_type": "gemma3_text"}}')
    tensors = {"language_model.model.embed_tokens.weight": 12, "vision_tower.embeddings.weight": 7}
    save_file({name: torch.zeros(rows, 2) for name, rows in tensors.items()}, folder / "model.safetensors")
    assert ModelFiles.find(str(folder), key="model").vocab_size == 12


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"vocab_size": None}, "vocab_size=None, must be a number"),
        ({"text_config": "gemma"}, "not an object"),
        ({"vocab_size": True}, "vocab_size=True, must be a number"),
        ({"vocab_size": 8, "text_config": []}, "its text_config is empty"),
        ({"vocab_size": 8, "eos_token_id": "</s>"}, "eos_token_id='</s>' .* must be an id below 8"),
        ({"vocab_size": 8, "eos_token_id": [1, 8]}, r"eos_token_id=\[1, 8\] .* must be an id below 8"),
    ],
)
def test_a_wrong_config(config: dict[str, object], why: str, make_model: Callable[..., Path]) -> None:
    folder = make_model("s")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"model.student.path={folder}: .*{why}"):
        ModelFiles.find(str(folder), key="model.student.path")


def test_positions_by_any_name(make_model: Callable[..., Path]) -> None:
    assert ModelFiles.find(str(make_model("s", n_positions=1024)), key="model").max_positions == 1024
