"""All bad records of a run, for `--bad_records FILE`: in the work folder while it runs, in the file when it ends.

Guarantees: each bad record of the input is in the file once, in the order of the input, however often the run was
killed, and also where the run ends with too many of them, or with nothing that can be used.
Cost: a line and a flush to disk for each chunk with bad records.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from jllm import atomic
from jllm.data.prepare.saving.chunk_cache import Place
from jllm.data.prepare.workplace import BAD_RECORDS
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError
from jllm.guards import notation


class BadRecordLog:
    """The bad records of the chunks that were taken so far.

    Args:
        work: the work folder of the run.
    """

    def __init__(self, work: Path) -> None:
        self._path = work / BAD_RECORDS

    def resume(self, place: Place) -> None:
        """Forget the chunk `place` and all behind it: they are taken again."""
        if not self._path.is_file():
            return
        kept = [line for line in self._lines() if tuple(line["chunk"]) < place]
        atomic.write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, place: Place, name: str, bad: Sequence[BadRecord]) -> None:
        """Add what was bad in a chunk of the source `name`, before anything is made of the chunk."""
        if not bad:
            return
        records = [{"file": name, "line": each.line, "kind": each.kind, "reason": each.detail} for each in bad]
        descriptor = atomic.open_in_place(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps({"chunk": place, "records": records}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_to(self, target: Path) -> None:
        """Write JSON lines of file, line, kind and reason; an empty file where no record was bad."""
        lines = self._lines() if self._path.is_file() else []
        records = [record for line in lines for record in line["records"]]
        atomic.write_text(target, "".join(json.dumps(record) + "\n" for record in records))

    def _lines(self) -> list[dict[str, list[object]]]:
        found = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(notation.loads(text))
            except ValueError:  # the last one of a run that was killed: its chunk is taken again
                break
        return found


def check_target(target: Path, inputs: Sequence[str], sources: Sequence[Source]) -> None:
    """Refuse a file for bad records that would do harm, or cannot be written, before there are any.

    Raises:
        UserError: it is no regular file, is an input or lies in a folder of them, or its folder is not writable.
    """
    where = f"--bad_records {target}"
    if target.exists() and not target.is_file():
        raise UserError(f"{where}: is no regular file; give the name of a file")
    whole = target.resolve()
    if any(source.is_local and Path(source.path).resolve() == whole for source in sources):
        raise UserError(f"{where}: is an input; give another file")
    for given in inputs:
        folder = Path(given).expanduser()
        if folder.is_dir() and whole.is_relative_to(folder.resolve()):
            raise UserError(f"{where}: lies in the input folder {given}; give a file elsewhere")
    existing = whole.parent
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{where}: {existing} is no folder that can be written to; give a file elsewhere")
