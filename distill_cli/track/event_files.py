"""TensorBoard's event files, written and read with the package tensorboard alone.

`torch.utils.tensorboard` writes the same records, but torch takes seconds to import and the process that tracks runs
does without it; and its writer queues them for a thread, where a write here returns when the record is in the file.

Each process begins a new file: readers stop at a record that was cut off, as a kill may leave it.
"""

import os
import platform
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BytesIO, FileIO
from pathlib import Path

from google.protobuf.struct_pb2 import Value
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo
from tensorboard.plugins.text.metadata import create_summary_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

NAME = "events.out.tfevents."
HEADER, FOOTER = struct.Struct("<QI"), struct.Struct("<I")
"""Before a record, its length with a checksum; after it, its own checksum."""
VERSION = "brain.Event:2"


class EventFiles:
    """The event files in a folder. Times are in seconds since 1970."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: FileIO | None = None
        folder.mkdir(exist_ok=True)

    @property
    def is_open(self) -> bool:
        """Whether this process has written anything."""
        return self._file is not None

    def files(self) -> list[Path]:
        """Return the files of all processes, oldest first."""
        return sorted(self._folder.glob(f"{NAME}*"))

    def write_scalars(self, values: Mapping[str, float], *, step: int, at: float) -> None:
        scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._append(scalars, step=step, at=at)

    def write_text(self, tag: str, markdown: str, *, step: int, at: float) -> None:
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
        text = Summary.Value(tag=tag, metadata=create_summary_metadata(tag, ""), tensor=tensor)
        self._append([text], step=step, at=at)

    def begin_session(self, swept: Mapping[str, str]) -> None:
        """Write the keys and values that distinguish a run of a sweep, for TensorBoard's page HParams."""
        start = SessionStartInfo(start_time_secs=time.time())
        for key, text in swept.items():
            start.hparams[key].CopyFrom(hparam(text))
        self._append_hparams(metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    def end_session(self, *, is_success: bool) -> None:
        """Write how a run of a sweep ended."""
        status = api_pb2.STATUS_SUCCESS if is_success else api_pb2.STATUS_FAILURE
        end = SessionEndInfo(end_time_secs=time.time(), status=status)
        self._append_hparams(metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))

    def read_scalars(self) -> set[tuple[str, int]]:
        """Return tag and step of every scalar in the files."""
        found = (event for file in self.files() for event in events(file))
        values = ((event.step, value) for event in found for value in event.summary.value)
        return {(value.tag, step) for step, value in values if value.HasField("simple_value")}

    def close(self) -> None:
        """Close the file; the next write begins another."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = None

    def _append_hparams(self, tag: str, content: HParamsPluginData) -> None:
        shown = metadata.create_summary_metadata(content)
        self._append([Summary.Value(tag=tag, metadata=shown, tensor=metadata.NULL_TENSOR)], step=0, at=time.time())

    def _append(self, values: Sequence[Summary.Value], *, step: int, at: float) -> None:
        if self._file is None:
            name = f"{NAME}{time.time():.6f}.{platform.node()}.{os.getpid()}"  # readers sort files by name
            self._file = (self._folder / name).open("xb", buffering=0)
        if not self._file.tell():
            self._write(Event(wall_time=time.time(), file_version=VERSION))
        self._write(Event(wall_time=at, step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        """Write an event whole or, on a full disk, not at all."""
        assert self._file is not None, "begun"
        buffer, begin = BytesIO(), self._file.tell()
        RecordWriter(buffer).write(event.SerializeToString())
        data = buffer.getvalue()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(begin)
            self._file.seek(begin)
            raise


def events(file: Path) -> Iterator[Event]:
    """Yield the events of a file, without a last one that was cut off."""
    with file.open("rb") as opened:
        while len(header := opened.read(HEADER.size)) == HEADER.size:
            length, _ = HEADER.unpack(header)
            if len(data := opened.read(length + FOOTER.size)) < length + FOOTER.size:
                return
            yield Event.FromString(data[:length])


def hparam(text: str) -> Value:
    """Return a typed value: a number if it is one, so that TensorBoard draws it on an axis."""
    try:
        return Value(number_value=float(text))
    except ValueError:
        return Value(string_value=text)
