"""`metrics.jsonl` as a file: its lines, what of it a run that goes on keeps, and whose it is.

Records have a `step`; what happened to the run is an event (`event`, the other fields depend on which). Cost of going
on: one pass over the file, a line at a time.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.guards import notation

METRICS_NAME = "metrics.jsonl"
EVENT = "event"
"""The field that makes a line an event: what happened to the run, by name."""
RUN = "run"
"""The field of the events that begin a start of a run: its id."""


def is_evaluation(record: dict[str, Any]) -> bool:
    """Whether a record is of an evaluation."""
    return "eval_loss" in record


def is_event(record: dict[str, Any]) -> bool:
    """Whether a record is an event, and neither a training step nor an evaluation."""
    return EVENT in record


def line_of(record: dict[str, Any]) -> str:
    """A record as a line of the file. JSON has no NaN: numbers that are not finite are text."""
    return json.dumps({key: _finite(value) for key, value in record.items()}, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def drop_from_step(path: Path, first_step: int, *, evaluates_first: bool) -> None:
    """Remove what a run that goes on with `first_step` is about to record again: steps and evaluations.

    Events stay: they happened. A line that was being written when the run died goes too.

    Args:
        path: of the file, which may be missing.
        first_step: the first step that is made.
        evaluates_first: whether an evaluation is made before it.
    """
    if not path.is_file():
        return

    def is_kept(record: dict[str, Any]) -> bool:
        if is_event(record):
            return True
        again = evaluates_first and is_evaluation(record)
        return bool(record["step"] < first_step - again)

    with atomic.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _records(path) if is_kept(record))


LARGEST_NUMBER = 1e100
MOST_OF_A_LIST = 4096


def sound(record: Any) -> dict[str, Any]:
    """A record as what draws it may take it: without what no run writes.

    Numbers beyond `LARGEST_NUMBER`, and lists of more than `MOST_OF_A_LIST`, are left out.

    Raises:
        KeyError, TypeError: it has no step, or is no object.
    """
    step = record["step"]
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise TypeError(f"step {step!r:.40}")
    if EVENT in record and not isinstance(record[EVENT], str):
        raise TypeError(f"event {record[EVENT]!r:.40}")
    found = {}
    for name, value in record.items():
        items = value if isinstance(value, list) else [value]
        if len(items) <= MOST_OF_A_LIST and all(map(_may_be_drawn, items)):
            found[name] = value
    return found


def _may_be_drawn(value: Any) -> bool:
    return not isinstance(value, int | float) or not abs(value) > LARGEST_NUMBER or value != value


def run_of_records(path: Path) -> str | None:
    """The id of the run that made these records; None where they do not say, or are not there."""
    if not path.is_file():
        return None
    return next((str(record[RUN]) for _, record in _records(path) if is_event(record) and RUN in record), None)


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a file that are whole, and what they say."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = notation.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int) and line.endswith("\n"):
                yield line, record
