"""What `replacing` leaves on disk; tests/checkpoint/test_store.py tests sealed folders."""

from pathlib import Path

import pytest

from distill_cli.folders.atomic_dir import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("unique", [False, True])
def test_a_file_is_replaced(unique: bool, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    for text in ("one", "two"):
        with replacing(file, unique=unique) as temporary:
            temporary.write_text(text)
            assert file.exists() == (text == "two")
        assert file.read_text() == text
    assert names(tmp_path) == ["a.json"]


def fail(path: Path, *, is_folder: bool) -> None:
    with replacing(path) as temporary:
        if is_folder:
            temporary.mkdir()
        (temporary / "weights" if is_folder else temporary).write_text("half")
        raise KeyboardInterrupt


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        fail(file, is_folder=False)
    assert file.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_an_error_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / "model", is_folder=True)
    assert names(tmp_path) == []


def test_a_killed_writer_s_folder_goes(tmp_path: Path) -> None:
    (tmp_path / ".model.tmp").mkdir()
    (tmp_path / ".model.tmp" / "stale").touch()
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == []


def test_a_link_is_replaced(tmp_path: Path) -> None:
    for target in ("one", "two"):
        with replacing(tmp_path / "latest", unique=True) as link:
            link.symlink_to(target)
    assert (tmp_path / "latest").readlink() == Path("two")
