"""Read back what trackers hold of a run: with MLflow's client, W&B's own records, TensorBoard's own reader."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from distill_cli.folders.metrics_file import read_metrics
from distill_cli.folders.run_dir import RunDir, read_json

Values = list[tuple[str, int, float]]
"""Metric, step and value, sorted; a value that is there twice is in it twice."""


def recorded_values(run: RunDir, *streams: str) -> Values:
    """What the run's own files hold."""
    rows = [row for stream in streams if (run.path / stream).exists() for row in read_metrics(run.path / stream)]
    values = [(key, int(row["step"]), value) for row in rows for key, value in row.items() if value is not None]
    return sorted(value for value in values if value[0] not in ("step", "time"))


def same(found: Values, wanted: Values) -> bool:
    """Whether both hold the same; TensorBoard keeps seven digits of a value."""
    names = [[value[:2] for value in values] for values in (found, wanted)]
    return names[0] == names[1] and [value[2] for value in found] == pytest.approx([value[2] for value in wanted])


def mlflow_values(run: RunDir) -> Values:
    state = read_json(run.path / "mlflow.json")
    client, run_id = MlflowClient(tracking_uri=state["uri"]), state["run_id"]
    keys = client.get_run(run_id).data.metrics
    return sorted((key, m.step, m.value) for key in keys for m in client.get_metric_history(run_id, key))


def wandb_values(run: RunDir) -> Values:
    """Return what `wandb sync` would send of all offline folders in the run's folder."""
    found = []
    for record in wandb_records(run):
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        found += [(key, row["_step"], value) for key, value in row.items() if not key.startswith("_")]
    return sorted(found)


def wandb_records(run: RunDir) -> Iterator[Record]:
    for file in sorted(run.path.glob("wandb/offline-run-*/*.wandb")):
        yield from map(Record.FromString, blocks(file))


def blocks(file: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    content, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if (left := -at % 32768) and left < 7:  # too little for a header
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        if kind == 0:
            return
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def tensorboard_values(run: RunDir) -> Values:
    events = accumulated(run)
    return sorted((tag, one.step, one.value) for tag in events.Tags()["scalars"] for one in events.Scalars(tag))


def tensorboard_texts(run: RunDir) -> dict[str, list[tuple[int, str]]]:
    events = accumulated(run)
    texts = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"] if not tag.startswith("_hparams_")}
    return {tag: [(one.step, one.tensor_proto.string_val[0].decode()) for one in found] for tag, found in texts.items()}


def accumulated(run: RunDir) -> EventAccumulator:
    events = EventAccumulator(str(run.path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    return events.Reload()
