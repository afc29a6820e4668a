"""A traced step as rows of bars: what every stage did, and what it would do in the ideal schedule.

The part of a receive in which the other stage had not begun to send is waiting. The ideal has the same order of
forward and backward passes on each stage, all of them as long as they are on average over all stages, and nothing
between them: what it is shorter by is what uneven stages, communication and the rest cost.
"""

import dataclasses
import statistics
from collections.abc import Sequence

from jllm.train.records import trace
from jllm.train.records.trace import ProcessTrace, Span, Trace

WAITING, COMMUNICATION = "waiting", "send, receive"
COLOURS = {
    trace.FORWARD: "#2f6fde",
    trace.BACKWARD: "#2a9d5c",
    COMMUNICATION: "#8b5cc7",
    WAITING: "#9ca3af",
    trace.LOAD: "#8a7a1f",
    trace.REDUCE: "#c43d6b",
    trace.OPTIMIZER: "#d9622b",
}
"""Of the kinds of bars, in the order of the legend; what has no bar is idle."""
_SENDERS = {
    trace.RECEIVE_ACTIVATION: (trace.SEND_ACTIVATION, -1),
    trace.RECEIVE_GRADIENT: (trace.SEND_GRADIENT, 1),
}
_COMPUTES = (trace.FORWARD, trace.BACKWARD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bar:
    """A stretch of a row: a kind of `COLOURS`, its seconds, and what it is, for people."""

    kind: str
    start: float
    end: float
    text: str
    micro_batch: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lane:
    """A row of a timeline: what one stage did."""

    name: str
    bars: list[Bar]

    def share(self, *kinds: str, of: float) -> float:
        """The share of `of` seconds that bars of these kinds fill."""
        return sum(bar.end - bar.start for bar in self.bars if bar.kind in kinds) / of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A step: its rows, real and ideal, and how long each is.

    Attributes:
        title: which step.
        rows: of all stages of all pipelines.
        ideal: of one pipeline.
        seconds, ideal_seconds: from the first bar to the last.
        notes: for people.
    """

    title: str
    rows: list[Lane]
    ideal: list[Lane]
    seconds: float
    ideal_seconds: float
    notes: list[str]


def timeline_of(found: Trace) -> Timeline:
    """The rows of a trace."""
    seconds = max(span.end for process in found.processes for span in process.spans)
    axes = [axis for axis in ("pipeline", "run", "slice") if len({getattr(each, axis) for each in found.processes}) > 1]
    rows, ideal_of = [], None
    for number in found.pipelines:
        processes = found.pipeline(number)
        for process in processes:
            # They pass activations on to those that have the same part of them.
            stages = [each for each in processes if (each.run, each.slice) == (process.run, process.slice)]
            ideal_of = ideal_of or stages
            name = ", ".join([f"stage {process.stage}", *(f"{axis} {getattr(process, axis)}" for axis in axes)])
            rows.append(Lane(name=name, bars=_bars(process, stages)))
    assert ideal_of is not None
    ideal = _ideal(ideal_of)
    ideal_seconds = max((bar.end for row in ideal for bar in row.bars), default=0.0)
    notes = [
        f"step {found.step}: {duration(seconds)}; forward and backward passes alone, on even stages and without"
        f" anything between them, {duration(ideal_seconds)} ({100 * ideal_seconds / seconds:.0f} %)"
    ]
    for row in rows:
        computes, waits = row.share(*_COMPUTES, of=seconds), row.share(WAITING, of=seconds)
        busy = row.share(*(kind for kind in COLOURS if kind != WAITING), of=seconds)
        notes.append(
            f"{row.name}: computes {100 * computes:.0f} %, waits for its neighbours {100 * waits:.0f} %, otherwise idle"
            f" {100 * (1 - busy - waits):.0f} %"
        )
    notes.append(f"clocks of processes may differ by {duration(found.clock_error)}")
    return Timeline(
        title=f"step {found.step}",
        rows=rows,
        ideal=ideal,
        seconds=seconds,
        ideal_seconds=ideal_seconds,
        notes=notes,
    )


def duration(seconds: float) -> str:
    """0.01234 → "12.34 ms"; 2 → "2.00 s"."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.2f} ms"


def _bars(process: ProcessTrace, stages: Sequence[ProcessTrace]) -> list[Bar]:
    by_stage = {each.stage: each for each in stages}
    bars = []
    for span in process.spans:
        start, kind = span.start, span.kind
        if kind in _SENDERS:
            sent, towards = _SENDERS[kind]
            sender = by_stage.get(process.stage + towards)
            began = [each.start for each in sender.spans if _is(each, sent, span.micro_batch)] if sender else []
            start = min(max(began[0], span.start), span.end) if began else span.start
            if start > span.start:
                bars.append(_bar(WAITING, span, span.start, start, f"waiting to {kind}"))
        shown = kind if kind in COLOURS else COMMUNICATION
        if span.end > start:
            bars.append(_bar(shown, span, start, span.end, kind))
    return bars


def _is(span: Span, kind: str, micro_batch: int | None) -> bool:
    return span.kind == kind and span.micro_batch == micro_batch


def _bar(kind: str, span: Span, start: float, end: float, what: str) -> Bar:
    which = "" if span.micro_batch is None else f", micro-batch {span.micro_batch}"
    text = f"{what}{which}: {duration(end - start)}, from {duration(start)}"
    return Bar(kind=kind, start=start, end=end, text=text, micro_batch=span.micro_batch)


def _ideal(stages: Sequence[ProcessTrace]) -> list[Lane]:
    """The same passes, equally long on all stages, each as early as those that it needs allow."""
    spans = [span for process in stages for span in process.spans]
    mean = {
        kind: statistics.fmean([span.seconds for span in spans if span.kind == kind] or [0.0]) for kind in _COMPUTES
    }
    left = {process.stage: [span for span in process.spans if span.kind in _COMPUTES] for process in stages}
    last = max(left)
    done: dict[tuple[str, int, int | None], float] = {}
    free = dict.fromkeys(left, 0.0)
    rows = {stage: Lane(name=f"stage {stage}, ideal", bars=[]) for stage in left}
    moved = True
    while moved:
        moved = False
        for stage, passes in left.items():
            while passes:
                span = passes[0]
                needs = _needed(span, stage, last)
                if needs is not None and needs not in done:
                    break
                start = max(free[stage], done[needs] if needs is not None else 0.0)
                end = start + mean[span.kind]
                done[span.kind, stage, span.micro_batch] = free[stage] = end
                rows[stage].bars.append(_bar(span.kind, span, start, end, span.kind))
                del passes[0]
                moved = True
    return list(rows.values())


def _needed(span: Span, stage: int, last: int) -> tuple[str, int, int | None] | None:
    """The pass that has to be over before another one begins."""
    if span.kind == trace.FORWARD:
        return None if stage == 0 else (trace.FORWARD, stage - 1, span.micro_batch)
    if stage == last:
        return (trace.FORWARD, stage, span.micro_batch)
    return (trace.BACKWARD, stage + 1, span.micro_batch)
