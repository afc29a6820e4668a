"""The curves of runs, drawn into one file: loss, learning rate, speed, use of the hardware, evaluations, timelines.

Reads the `metrics.jsonl` of one or several runs (see `jllm.train.records.metrics`), and the traces of steps beside
them, and writes an HTML page that needs nothing else (the default), or a PNG where the file name says so and matplotlib
is installed. A point whose value is missing or not finite (a skipped step) is left out. The file is there completely or
not at all.

Cost: a pass over the files; curves of more than `MOST_POINTS` points are thinned to the first, last, lowest and highest
of each stretch, so spikes stay.
"""

import dataclasses
import datetime
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError
from jllm.guards import notation
from jllm.train.records.metrics_file import EVENT, METRICS_NAME, is_evaluation, is_event, sound
from jllm.train.records.timeline import Timeline, timeline_of
from jllm.train.records.trace import TRACE_NAME, read_trace

MOST_POINTS = 2000
PANELS = (
    ("loss", "eval_loss", "loss"),
    (None, "accuracy", "accuracy"),
    (None, "top5_accuracy", "top-5 accuracy"),
    (None, ("loss_p10", "loss_p50", "loss_p90", "loss_p99"), "loss of tokens, quantiles"),
    (None, ("entropy_p10", "entropy_p50", "entropy_p90", "entropy_p99"), "entropy of predictions, quantiles"),
    ("lr", None, "learning rate"),
    ("grad_norm", None, "gradient norm"),
    ("tokens_per_second", None, "tokens / s"),
    ("mfu", None, "MFU"),
    ("filled", None, "share of micro-batches that is tokens"),
    ("seconds", None, "seconds a step"),
    ("data_wait", None, "share of a step that waits for data"),
    ("memory_mib", None, "peak memory, MiB"),
    ("reserved_mib", None, "peak memory reserved, MiB"),
    ("alloc_retries", None, "allocations tried again"),
    ("device_busy", None, "device busy, %"),
    ("aux_loss", None, "balance loss of routers"),
    ("max_expert_load", None, "largest load of an expert"),
)
"""What is drawn: the name in a training record, the name or names in an evaluation, and the title."""
NOISY = ("loss", "grad_norm", "tokens_per_second", "mfu", "seconds", "data_wait", "device_busy", "aux_loss")
"""What a running mean makes easier to read."""
AXES = ("step", "tokens", "hours")
MARKED = {"resume": 0, "spike": 1, "bad_step": 4, "checkpoint_failed": 4}
"""Events that are marked in the first panel, and their colours."""
MOST_MARKS = 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel: its name and its (x, value) points, ascending by x; further fields as `svg` has them."""

    name: str
    points: list[tuple[float, float]]
    dashed: bool = False
    raw: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    colour: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened to a run."""

    x: float
    text: str
    colour: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One diagram."""

    title: str
    curves: list[Curve]
    x_title: str = "step"
    marks: list[Mark] = dataclasses.field(default_factory=list)
    log_x: bool = False
    log_y: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Look:
    """How curves are drawn.

    Attributes:
        smooth: weight of what came before in a running mean of the `NOISY` curves; 0 draws them as they are.
        x: one of `AXES`.
        log_x, log_y: logarithmic axes, without what is not above 0.
    """

    smooth: float = 0.0
    x: str = "step"
    log_x: bool = False
    log_y: bool = False


PLAIN = Look()


def plot(runs: list[Path], output: Path | None = None, look: Look = PLAIN) -> Path:
    """Draw `runs`, or traces of steps, into one file; returns its path.

    Raises:
        UserError: no records, unreadable ones, or a PNG without matplotlib.
    """
    traces = [run for run in runs if run.suffix == ".json" and run.is_file()]
    files = [find_metrics(run) for run in runs if run not in traces]
    panels: list[Panel] = []
    if files:
        panels = panels_of(dict(zip(_names(files), map(read_records, files), strict=True)), look)
    if len(files) == 1:
        beside = sorted(files[0].parent.glob(TRACE_NAME.format(step="*")), key=lambda path: (len(path.name), path))
        traces = list({path.resolve(): path for path in (*traces, *beside)}.values())
    timelines = [timeline_of(read_trace(path)) for path in traces]
    if not panels and not timelines:
        raise UserError(f"{runs[0]}: nothing to draw yet; wait for the first step")
    output = output or (files[0].with_name("plot.html") if files else traces[0].with_suffix(".html"))
    title = ", ".join(str(run) for run in runs)
    try:
        if output.suffix.lower() == ".png":
            _write_png(output, title, panels, timelines)
        else:
            from jllm.train.records.svg import page
            from jllm.train.records.timeline_svg import section

            atomic.write_text(output, page(title, panels, map(section, timelines)))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another file with -o") from None
    return output


def _write_png(output: Path, title: str, panels: list[Panel], timelines: list[Timeline]) -> None:
    try:
        from jllm.train.records.png import write_png
    except ImportError:
        raise UserError(
            f"--output {output}: PNG needs matplotlib (pip install matplotlib); or give a name that ends in .html"
        ) from None
    write_png(output, title, panels, timelines)


def find_metrics(run: Path) -> Path:
    """The records a user means: the file itself, or in the folder, or in its `log` folder.

    Raises:
        UserError: there are none.
    """
    for path in (run, run / METRICS_NAME, run / "log" / METRICS_NAME):
        if path.is_file():
            return path
    raise UserError(f"{run}: no {METRICS_NAME} there or in its log folder; give the folder that --log_dir named")


def _names(files: list[Path]) -> list[str]:
    """What tells the runs apart: the last parts of their paths, as many as are needed."""
    folders = [path.resolve().parent for path in files]
    folders = [folder.parent if folder.name == "log" else folder for folder in folders]
    most = max(len(folder.parts) for folder in folders)
    for count in range(1, most + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"{files[0]}: given twice; give each run once")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run; a line that is still being written, or was when the run died, ends them.

    Raises:
        UserError: a line in the middle is not a record, or there is none at all.
    """
    try:
        lines = notation.read_text(path).splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a run's {METRICS_NAME}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = sound(notation.loads(line))
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a record with a step; give a run's {METRICS_NAME}") from None
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records yet; wait for the first step")
    return records


class _Xs:
    """Where the records of a run lie on the axis that was asked for."""

    def __init__(self, records: list[dict[str, Any]], axis: str) -> None:
        self._axis = axis
        self._tokens: dict[int, float] = {0: 0.0}
        for record in records:
            if isinstance(record.get("consumed_tokens"), int | float):
                self._tokens[record["step"]] = float(record["consumed_tokens"])
        times = [time for record in records if (time := _time(record)) is not None]
        self._zero = min(times, default=0.0)

    def of(self, record: dict[str, Any]) -> float | None:
        """None where the record does not say."""
        if self._axis == "step":
            return float(record["step"])
        if self._axis == "tokens":
            return self._tokens.get(record["step"])
        time = _time(record)
        return None if time is None else (time - self._zero) / 3600


def _time(record: dict[str, Any]) -> float | None:
    try:
        return datetime.datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def panels_of(runs: dict[str, list[dict[str, Any]]], look: Look = PLAIN) -> list[Panel]:
    """The panels that have any points, curves named after the run where there are several runs."""
    panels: list[Panel] = []
    for training, evaluation, title in PANELS:
        curves: list[Curve] = []
        for run, records in runs.items():
            prefix = f"{run} " if len(runs) > 1 else ""
            xs = _Xs(records, look.x)
            steps = [record for record in records if not is_evaluation(record) and not is_event(record)]
            found = _training(f"{prefix}train", steps, training, xs, look) if training else []
            for key in (evaluation,) if isinstance(evaluation, str) else evaluation or ():
                found += _evaluations(prefix, records, key, xs, several=not isinstance(evaluation, str))
            drawable = [curve for curve in (_above_zero(curve, look) for curve in found) if curve.points]
            curves += [dataclasses.replace(curve, colour=len(curves) + number) for number, curve in enumerate(drawable)]
        if curves:
            marks = [mark for run, records in runs.items() for mark in _marks(run, records, look)] if not panels else []
            panels.append(
                Panel(
                    title=title,
                    curves=curves,
                    x_title=look.x,
                    marks=marks if len(marks) <= MOST_MARKS else [],
                    log_x=look.log_x,
                    log_y=look.log_y,
                )
            )
    return panels


def _training(name: str, steps: list[dict[str, Any]], key: str, xs: _Xs, look: Look) -> list[Curve]:
    """The curve of a number, or those of a list of numbers, one a stage."""
    smooth = look.smooth if key in NOISY else 0.0
    stages = max((len(value) for record in steps if isinstance(value := record.get(key), list)), default=None)
    if stages is None:
        return [_smoothed(name, _points(steps, key, xs), smooth)]
    return [
        _smoothed(
            f"{name} stage {stage}" if stages > 1 else name,
            _points([{**record, key: record[key][stage]} for record in steps if _has(record, key, stage)], key, xs),
            smooth,
        )
        for stage in range(stages)
    ]


def _above_zero(curve: Curve, look: Look) -> Curve:
    """A curve without what logarithmic axes do not have."""

    def kept(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x, y) for x, y in points if (x > 0 or not look.log_x) and (y > 0 or not look.log_y)]

    return dataclasses.replace(curve, points=kept(curve.points), raw=kept(curve.raw))


def _has(record: dict[str, Any], key: str, stage: int) -> bool:
    value = record.get(key)
    return isinstance(value, list) and len(value) > stage


def _evaluations(prefix: str, records: list[dict[str, Any]], key: str, xs: _Xs, *, several: bool) -> list[Curve]:
    """A curve for each set; `several`: of several numbers, so that the curve says which."""
    evaluations = [record for record in records if is_evaluation(record)]
    curves = []
    for name in dict.fromkeys(str(record.get("name")) for record in evaluations):
        of_set = [record for record in evaluations if str(record.get("name")) == name]
        which = f" {key.rpartition('_')[2]}" if several else ""
        points = thinned(_points(of_set, key, xs))
        curves.append(Curve(name=f"{prefix}eval {name}{which}", points=points, dashed=True))
    return curves


def _points(records: Iterable[dict[str, Any]], key: str, xs: _Xs) -> list[tuple[float, float]]:
    found = []
    for record in records:
        value, x = record.get(key), xs.of(record)
        if x is not None and isinstance(value, int | float) and math.isfinite(value):
            found.append((x, float(value)))
    return sorted(found)


def _smoothed(name: str, points: list[tuple[float, float]], smooth: float) -> Curve:
    if not smooth:
        return Curve(name=name, points=thinned(points))
    mean, weight, smoothed = 0.0, 0.0, []
    for x, value in points:
        mean, weight = smooth * mean + (1 - smooth) * value, smooth * weight + 1 - smooth
        smoothed.append((x, mean / weight))  # of all values so far, whose weights add up to one
    return Curve(name=name, points=thinned(smoothed), raw=thinned(points))


def _marks(run: str, records: list[dict[str, Any]], look: Look) -> list[Mark]:
    xs = _Xs(records, look.x)
    found = []
    for record in records:
        if is_event(record) and record[EVENT] in MARKED:
            x = xs.of(record)
            if x is not None:
                name = str(record[EVENT])
                text = f"{run}: {name.replace('_', ' ')} after step {record['step']}"
                found.append(Mark(x=x, text=text, colour=MARKED[name]))
    return found


def thinned(points: list[tuple[float, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the first, last, lowest and highest of each stretch of equal length."""
    if len(points) <= most:
        return points
    stretch = math.ceil(4 * len(points) / most)
    kept = []
    for at in range(0, len(points), stretch):
        part = points[at : at + stretch]
        by_value = {part[0], part[-1], min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept.extend(sorted(by_value))
    return kept
