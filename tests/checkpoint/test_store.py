"""Checkpoints on disk: damage is found and named, the best and the newest are kept."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_cli.checkpoint import store
from distill_cli.config.execution_schema import CheckpointConfig
from distill_cli.errors import DistillError
from distill_cli.folders import atomic_dir


def make(root: Path, step: int, **metrics: float | None) -> Path:
    final = store.folder(root, step)
    temporary = atomic_dir.hidden(final, "tmp")
    temporary.mkdir(parents=True)
    (temporary / "shard-00001-model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 40)
    (temporary / store.STATE).write_text(json.dumps({"step": step, "metrics": metrics}))
    entries = atomic_dir.describe(temporary.iterdir())
    atomic_dir.seal(temporary, final, entries)
    return final


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("hurt", "problem"),
    [
        (flip, "has changed since"),
        (lambda file: file.write_bytes(file.read_bytes()[:100]), "has 100 bytes instead of 10240"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_newest_whole_skips_damaged(tmp_path: Path, hurt: Callable[[Path], object], problem: str) -> None:
    make(tmp_path, 10)
    newest = make(tmp_path, 20)
    hurt(newest / "shard-00001-model-00001-of-00002.safetensors")
    warnings: list[str] = []
    assert store.newest_whole(tmp_path, warn=warnings.append).step == 10
    (warning,) = warnings
    assert str(newest) in warning
    assert f"shard-00001-model-00001-of-00002.safetensors {problem}" in warning


@pytest.mark.parametrize("content", ["", "{}", '{"files": 3}', '{"files": {"../x": {"bytes": 1, "sha256": ""}}}'])
def test_a_bad_manifest_is_damage(tmp_path: Path, content: str) -> None:
    path = make(tmp_path, 10)
    (path / atomic_dir.MANIFEST).write_text(content)
    assert atomic_dir.MANIFEST in atomic_dir.damage(path)
    assert store.newest_whole(tmp_path, warn=lambda text: None) is None


def test_unfinished_checkpoints_are_removed(tmp_path: Path) -> None:
    make(tmp_path, 10)
    atomic_dir.hidden(store.folder(tmp_path, 20), "tmp").mkdir()
    assert [checkpoint.step for checkpoint in store.find(tmp_path)] == [10]
    store.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_10"]


def keep(root: Path, number: int, *, higher_is_better: bool = True) -> list[int]:
    store.prune(root, keep_top_k=number, metric="val/accuracy", higher_is_better=higher_is_better)
    return [checkpoint.step for checkpoint in store.find(root)]


def test_best_and_newest_are_kept(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8), (5, None), (6, 0.1)):
        make(tmp_path, step, **{"val/accuracy": accuracy})
    assert keep(tmp_path, 3) == [2, 3, 4, 6]
    assert keep(tmp_path, 1, higher_is_better=False) == [6]


def test_a_sealed_folder_replaces_its_predecessor(tmp_path: Path) -> None:
    make(tmp_path, 1, **{"val/accuracy": 0.5})
    path = make(tmp_path, 1, **{"val/accuracy": 0.7})
    assert store.Checkpoint(path).metric("val/accuracy") == 0.7
    assert atomic_dir.damage(path) is None
    assert [folder.name for folder in tmp_path.iterdir()] == ["step_1"]


def test_valueless_ones_are_never_best(tmp_path: Path) -> None:
    for step, accuracy in ((1, 0.2), (2, None), (3, 0.4), (4, None)):
        make(tmp_path, step, **{"val/accuracy": accuracy})
    assert keep(tmp_path, 2) == [1, 3, 4]
    with pytest.raises(DistillError, match="no checkpoint 2"):
        store.choose(tmp_path, "2", CheckpointConfig(), warn=print)
    assert store.choose(tmp_path, "best", CheckpointConfig(), warn=print).step == 3
    assert store.choose(tmp_path, "last", CheckpointConfig(), warn=print).step == 4


def test_without_values_newest_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        make(tmp_path, step)
    assert keep(tmp_path, 2) == [4, 5]
    with pytest.raises(DistillError, match="none has a value for val/accuracy"):
        store.choose(tmp_path, "best", CheckpointConfig(), warn=print)


def test_damaged_ones_are_not_chosen(tmp_path: Path) -> None:
    flip(make(tmp_path, 10) / "shard-00001-model-00001-of-00002.safetensors")
    with pytest.raises(DistillError, match=r"step_10: damaged: shard-.* has changed"):
        store.choose(tmp_path, "last", CheckpointConfig(), warn=print)
