"""TensorBoard: every number of `metrics.jsonl`, in an event file of this start of the run.

A run that goes on purges the steps that it is about to repeat. The file is written as `metrics.jsonl` is, entry by
entry, so that nothing is lost when a run ends by an error and a full disk ends nothing.
"""

import io
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jllm.train.records.appended_file import AppendedFile
from jllm.train.records.sinks.flat import flat_numbers


class Board:
    """An event file of TensorBoard's.

    Args:
        folder: of the run's records.
        first_step: the first step that is made.
        warn: as for `AppendedFile`.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, first_step: int, warn: Callable[[str], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        self._bytes = io.BytesIO()
        self._writer = RecordWriter(self._bytes)
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = AppendedFile(folder / name, warn)
        self._append(Event(wall_time=now, file_version="brain.Event:2"))
        self._append(Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def numbers(self, record: dict[str, Any]) -> None:
        """Write a record."""
        values = [
            self._summary.Value(tag=tag.replace(" ", "_"), simple_value=value)
            for tag, value in flat_numbers(record).items()
        ]
        if values:
            self._append(self._event(wall_time=time.time(), step=record["step"], summary=self._summary(value=values)))

    def _append(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._file.append(self._bytes.getvalue())
        self._bytes.seek(0)
        self._bytes.truncate()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
