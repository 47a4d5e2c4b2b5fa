"""Weights written as safetensors files; tests/engines loads an export with vLLM."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distill_cli.student import safetensors_writer
from distill_cli.student.safetensors_writer import Weights, write_weights

TENSORS = {name: torch.randn(rows, 8) for name, rows in {"a": 4, "b": 3, "large": 40, "c": 2, "d": 5}.items()}
WEIGHTS = Weights(
    {name: tensor.shape for name, tensor in TENSORS.items()}, lambda names: {name: TENSORS[name] for name in names}
)


@pytest.mark.parametrize("read_bytes", [100, 2**28])
@pytest.mark.parametrize(("max_file_bytes", "num_files"), [(100_000, 1), (150, 3)])
def test_files_hold_the_tensors(
    max_file_bytes: int, num_files: int, read_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "READ_BYTES", read_bytes)
    write_weights(WEIGHTS, tmp_path, dtype=torch.bfloat16, max_file_bytes=max_file_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    found = {name: (file.name, tensor) for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(found[name][1], tensor.bfloat16())
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (num_files > 1)
    if num_files > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for name, (file, _) in found.items()}
        assert content["metadata"] == {"total_size": 2 * sum(map(torch.numel, TENSORS.values()))}
