"""What a source is, so that another one in its place is noticed.

Guarantees: a file of up to `WHOLE` bytes is told from any other of its size by all it holds, whatever its dates are, so
that a copy of it is the same. Of a larger one stretches are compared, and its dates; where they cannot tell, it counts
as another.
Cost: up to 4 MiB of each file read once more.
"""

import os
import stat
import zlib
from collections.abc import Mapping
from typing import Any

from jllm.data.sources.inputs import Source

WHOLE = 4 << 20
_STRETCHES, _STRETCH = 64, 64 << 10


def record_of(source: Source) -> dict[str, Any]:
    """What a run remembers of a source, as plain data.

    `sample` is a checksum of its content, or of stretches of it; `modified` and `changed` are when its content and
    anything about it (name, place, link) changed last, in nanoseconds. All three are None for what is no local file.
    """
    facts = _facts(source.path) if source.is_local and not source.once else None
    found = {"sample": None, "modified": None, "changed": None} if facts is None else facts
    return {"name": source.name, "bytes": source.size, "stem": source.stem, **found}


def modified_at(path: str) -> int | None:
    """When a local file was last changed, in nanoseconds; None for anything else."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return None


def is_same(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether a source is what `record_of` said of it before."""
    if any(now[key] != before.get(key) for key in ("name", "bytes", "stem", "sample")):
        return False
    return _is_whole(now) or bool(now["modified"] == before.get("modified"))


def is_same_since(now: Mapping[str, Any], made: Mapping[str, Any], made_at: int) -> bool:
    """Whether a source is the one that a data set was made of.

    Args:
        made: its name, size and sample, which are all that the data set remembers.
        made_at: when it was finished, in nanoseconds.
    """
    if any(now[key] != made.get(key) for key in ("name", "bytes", "sample")):
        return False
    return _is_whole(now) or max(now["modified"] or 0, now["changed"] or 0) <= made_at


def _is_whole(record: Mapping[str, Any]) -> bool:
    return record["sample"] is not None and record["bytes"] <= WHOLE


def _facts(path: str) -> dict[str, Any] | None:
    try:
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                return None
            size, total = found.st_size, 0
            if size <= WHOLE:
                stretches = [(0, size)]
            else:
                stretches = [(i * (size - _STRETCH) // (_STRETCHES - 1), _STRETCH) for i in range(_STRETCHES)]
            for start, length in stretches:
                total = zlib.crc32(os.pread(file.fileno(), length, start), total)
        changed = max(found.st_ctime_ns, os.lstat(path).st_ctime_ns)  # a link may be led elsewhere
    except OSError:  # which reading it will name
        return None
    return {"sample": f"{total:08x}", "modified": found.st_mtime_ns, "changed": changed}
