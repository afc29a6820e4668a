"""The trace of a step: what every process of a run did when, in a file beside the records.

Times are seconds since the first process began the step, by clocks that were compared before (`clock_error`). A
receive lasts from when it is asked for, so it holds the time in which nothing was sent yet.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED

TRACE_NAME = "trace-step-{step}.json"
FORMAT = 1
FORWARD, BACKWARD, LOAD, REDUCE, OPTIMIZER = "forward", "backward", "load", "reduce", "optimizer"
SEND_ACTIVATION, RECEIVE_ACTIVATION = "send activation", "receive activation"
SEND_GRADIENT, RECEIVE_GRADIENT = "send gradient", "receive gradient"
KINDS = (
    *(FORWARD, BACKWARD, SEND_ACTIVATION, RECEIVE_ACTIVATION, SEND_GRADIENT, RECEIVE_GRADIENT),
    *(LOAD, REDUCE, OPTIMIZER),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """Something that a process did.

    Attributes:
        kind: one of `KINDS`.
        start, end: in seconds.
        micro_batch: which, from 0; None where it is of the step.
    """

    kind: str
    start: float
    end: float
    micro_batch: int | None = None

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessTrace:
    """What one process did, in order.

    Attributes:
        stage, pipeline: its own.
        spans: what it did.
        slice, run: its slice of the stage and its run of the rows' tokens, from 0.
    """

    stage: int
    pipeline: int
    spans: tuple[Span, ...]
    slice: int = 0
    run: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """A step.

    Attributes:
        step: its number.
        clock_error: seconds by which the clocks of two processes may differ.
        processes: of all stages and pipelines.
    """

    step: int
    clock_error: float
    processes: tuple[ProcessTrace, ...]

    def pipeline(self, number: int) -> list[ProcessTrace]:
        """The processes of a pipeline, stage by stage."""
        found = (each for each in self.processes if each.pipeline == number)
        return sorted(found, key=lambda each: (each.stage, each.run, each.slice))

    @property
    def pipelines(self) -> list[int]:
        """Their numbers."""
        return sorted({each.pipeline for each in self.processes})

    def write(self, folder: Path) -> Path:
        """Write it beside the records of its run. Returns the file."""
        path = folder / TRACE_NAME.format(step=self.step)
        atomic.write_text(path, json.dumps({"format": FORMAT, **dataclasses.asdict(self)}) + "\n")
        return path


def read_trace(path: Path) -> Trace:
    """Read what `Trace.write` wrote.

    Raises:
        UserError: it is no such file.
    """
    try:
        found: dict[str, Any] = notation.read_json(path)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        processes = tuple(
            ProcessTrace(
                stage=int(each["stage"]),
                pipeline=int(each["pipeline"]),
                spans=tuple(_span(span) for span in each["spans"]),
                slice=int(each.get("slice", 0)),
                run=int(each.get("run", 0)),
            )
            for each in found["processes"]
        )
        if not any(span.end > 0 for each in processes for span in each.spans):
            raise ValueError("nothing in it")
        return Trace(step=int(found["step"]), clock_error=float(found["clock_error"]), processes=processes)
    except (OSError, *MALFORMED) as error:
        raise UserError(f"{path}: no trace ({error}); give a file that --trace_step wrote") from None


def _span(found: dict[str, Any]) -> Span:
    number = found["micro_batch"]
    span = Span(
        kind=str(found["kind"]),
        start=float(found["start"]),
        end=float(found["end"]),
        micro_batch=None if number is None else int(number),
    )
    if span.kind not in KINDS or not 0 <= span.start <= span.end < 1e9:
        raise ValueError(f"a span that is none: {found}")
    return span
