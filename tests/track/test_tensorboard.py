"""What TensorBoard shows of a run's folder, read back with its own reader; files and folders that are damaged."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.hparams import metadata

from distill_cli.cli import run as run_command
from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.rollouts_table import RolloutsFolder
from distill_cli.folders.run_dir import Element, RunDir, SweepDir, create, read_json, write_json
from distill_cli.track.event_files import EventFiles, events
from distill_cli.track.run_tracking import following
from distill_cli.track.shipper import ship
from distill_cli.types import Example, Prompt, Rollout, Sample
from tests.track.conftest import tensorboard_tracker, write_rows
from tests.track.readers import accumulated, recorded_values, same, tensorboard_texts, tensorboard_values


def event_files(run: RunDir) -> list[Path]:
    return sorted(run.path.glob("tensorboard/events.*"))


def all_events(run: RunDir) -> list[Event]:
    return [event for file in event_files(run) for event in events(file)]


def assert_all_there(run: RunDir) -> None:
    assert same(tensorboard_values(run), recorded_values(run, "metrics.jsonl", "system.jsonl"))


def test_scalars_have_their_times(run: RunDir) -> None:
    write_rows(run, range(3))
    ship(run, tensorboard_tracker(run), end="finished")
    found = [(one.step, one.wall_time) for one in accumulated(run).Scalars("train/loss")]
    assert found == [(row["step"], row["time"]) for row in read_metrics(run.metrics)]


def test_each_process_writes_one_file(run: RunDir) -> None:
    for first in (0, 2):
        tracker = tensorboard_tracker(run)
        for step in (first, first + 1):
            write_rows(run, [step])
            ship(run, tracker)
        ship(run, tracker, end="stopped")
    ship(run, tensorboard_tracker(run), end="stopped")  # nothing to write
    assert len(event_files(run)) == 2
    assert_all_there(run)


@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_a_cut_off_record_is_repeated(run: RunDir, share: float) -> None:
    write_rows(run, range(9))
    ship(run, tensorboard_tracker(run))
    (file,) = event_files(run)
    os.truncate(file, int(file.stat().st_size * share))
    (run.path / "tensorboard.json").write_text('{"made": 1, "is_sure": false}')  # killed in the middle of a write
    ship(run, tensorboard_tracker(run), end="failed")
    assert_all_there(run)


def test_a_removed_folder_is_written_again(run: RunDir) -> None:
    write_rows(run, range(3))
    ship(run, tensorboard_tracker(run), end="finished")
    shutil.rmtree(run.path / "tensorboard")
    assert ship(run, tensorboard_tracker(run), end="finished") == (6, 1)
    assert_all_there(run)


def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    files, written = EventFiles(small_disk / "tensorboard"), set()
    for is_full in (True, False, True, False):
        with suppress(OSError), (small_disk / "ballast").open("wb", buffering=0) as ballast:
            while is_full:
                ballast.write(bytes(1000))
        failed = False
        for step in range(len(written), len(written) + 100):
            try:
                files.write_scalars({"a" * 1000: 1.0}, step=step, at=1.0)
            except OSError:
                failed = True
                break
            written.add(("a" * 1000, step))
        assert failed == is_full
        assert files.read_scalars() == written
    assert len(files.files()) == 1


def test_a_folder_that_is_a_file(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    (run.path / "tensorboard").touch()
    with following(run, [tensorboard_tracker(run)]):
        write_rows(run, range(3))
        write_json(run.outcome, {"state": "finished"})
    assert "TensorBoard at" in caplog.text
    assert "File exists" in caplog.text
    assert "lacks some of the run; distill track sync" in caplog.text
    (run.path / "tensorboard").unlink()
    assert run_command(["track", "sync", str(run.path), "tracker=tensorboard"]) == 0
    assert_all_there(run)


def test_config_and_answers_are_texts(run: RunDir) -> None:
    texts = {1: "What is 1 + 1?", 2: "```\n# two\n```"}
    folder = RolloutsFolder(run.rollouts, decode=lambda ids: texts[ids[0]], token_text=str)
    prompts = [Prompt(index, [1], Example([{"role": "user", "content": "?"}])) for index in range(6)]
    for step in (0, 20):
        rollouts = [Rollout(one, Sample([2], None, "stop"), reward=0.5 if one.index else None) for one in prompts]
        folder.write(f"step_{step}.parquet", rollouts)
    folder.write("bad_step_3.parquet", rollouts)
    assert ship(run, tensorboard_tracker(run), end="finished") == (0, 3)
    found = tensorboard_texts(run)
    assert found.pop("config")[0][1].startswith("    model:\n")
    assert found.keys() == {f"answers/{index}" for index in range(4)}
    (first, _), (last, text) = found["answers/1"]
    assert (first, last) == (0, 20)
    assert text == "**prompt**\n\n    What is 1 + 1?\n\n**answer** (reward 0.5)\n\n    ```\n    # two\n    ```"


def test_a_sweep_has_hyperparameters(tmp_path: Path, run: RunDir) -> None:
    sweep = SweepDir(tmp_path / "sweep")
    swept = [["loss.topk=8", "loss=forward"], ["loss.topk=16", "loss=reverse"]]
    elements = [Element(index, str(index), words) for index, words in enumerate(swept)]
    sweep.write(command=["distill", "-m"], elements=elements)
    for one in elements:
        element = create(sweep.path / one.folder, command=["distill"], config=run.config.read_text())
        write_rows(element, range(2))
        ship(element, tensorboard_tracker(element), end=("finished", "failed")[one.index])
        ship(element, tensorboard_tracker(element))
        assert_all_there(element)
        found = [value for event in all_events(element) for value in event.summary.value if value.tag[0] == "_"]
        start, end = (value.metadata.plugin_data.content for value in found)
        hparams = metadata.parse_session_start_info_plugin_data(start).hparams
        assert hparams["loss.topk"].number_value == (8, 16)[one.index]
        assert hparams["loss"].string_value == ("forward", "reverse")[one.index]
        assert metadata.parse_session_end_info_plugin_data(end).status == (1, 2)[one.index]
    assert read_json(element.path / "tensorboard.json")["is_closed"] is False


def test_tracking_imports_no_torch() -> None:
    code = "import sys, distill_cli.track.event_files; sys.exit(bool({'torch', 'tensorflow'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
