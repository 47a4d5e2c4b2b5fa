"""What is read of a model's folder without torch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distill_cli.errors import ConfigError
from distill_cli.models import model_files


def test_headers_have_dtypes_and_shapes(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.zeros(4, dtype=torch.bfloat16)}, tmp_path / "two.safetensors")
    assert model_files.tensors(tmp_path) == {"a": ("F32", (2, 3)), "b": ("BF16", (4,))}


@pytest.mark.parametrize("num_bytes", [0, 5, 60, 300])
def test_a_cut_file_is_refused(num_bytes: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, file)
    assert file.stat().st_size > 300
    with file.open("r+b") as stream:
        stream.truncate(num_bytes)
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        model_files.tensors(tmp_path)
