"""Loss, learning rate, speed and gradient norm of runs, drawn into one file.

Reads the `metrics.jsonl` of one or several runs (see `jllm.train.records.metrics`) and writes an HTML page that needs
nothing else (the default), or a PNG where the file name says so and matplotlib is installed. A point whose value is
missing or not finite (a skipped step) is left out. The file is there completely or not at all.

Cost: a pass over the files; curves of more than `MOST_POINTS` points are thinned to the first, last, lowest and highest
of each stretch, so spikes stay.
"""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.errors import UserError

METRICS_NAME = "metrics.jsonl"
MOST_POINTS = 2000
PANELS = (
    ("loss", "loss"),
    ("lr", "learning rate"),
    ("tokens_per_second", "tokens / s"),
    ("grad_norm", "gradient norm"),
)
"""What is drawn: the name in a training record, and the title."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel: its name and its (step, value) points, ascending by step."""

    name: str
    points: list[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One diagram."""

    title: str
    curves: list[Curve]


def plot(runs: list[Path], output: Path | None = None) -> Path:
    """Draw `runs` into one file; returns its path.

    Raises:
        UserError: no records, unreadable ones, or a PNG without matplotlib.
    """
    files = [find_metrics(run) for run in runs]
    panels = panels_of(dict(zip(_names(files), map(read_records, files), strict=True)))
    output = output or files[0].with_name("plot.html")
    title = ", ".join(str(run) for run in runs)
    try:
        if output.suffix.lower() == ".png":
            _write_png(output, title, panels)
        else:
            from jllm.train.records.svg import page

            atomic.write_text(output, page(title, panels))
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give another file with -o") from None
    return output


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a run's {METRICS_NAME}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record["step"], int):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a record with a step; give a run's {METRICS_NAME}") from None
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records yet; wait for the first step")
    return records


def panels_of(runs: dict[str, list[dict[str, Any]]]) -> list[Panel]:
    """The panels that have any points, curves named after the run where there are several runs."""
    panels = []
    for key, title in PANELS:
        curves = []
        for run, records in runs.items():
            prefix = f"{run} " if len(runs) > 1 else ""
            curves.append(_curve(f"{prefix}train", [record for record in records if "eval_loss" not in record], key))
            if key == "loss":
                evaluations = [record for record in records if "eval_loss" in record]
                for name in dict.fromkeys(str(record.get("name")) for record in evaluations):
                    of_set = [record for record in evaluations if str(record.get("name")) == name]
                    curves.append(_curve(f"{prefix}eval {name}", of_set, "eval_loss"))
        curves = [curve for curve in curves if curve.points]
        if curves:
            panels.append(Panel(title=title, curves=curves))
    return panels


def _curve(name: str, records: Iterable[dict[str, Any]], key: str) -> Curve:
    points = [
        (float(record["step"]), float(record[key]))
        for record in records
        if isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return Curve(name=name, points=thinned(sorted(points)))


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


def _write_png(output: Path, title: str, panels: list[Panel]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            f"--output {output}: PNG needs matplotlib (pip install matplotlib); or give a name that ends in .html"
        ) from None
    figure = Figure(figsize=(12, 3.2 * ((len(panels) + 1) // 2) + 0.6), layout="constrained")
    figure.suptitle(title)
    for number, panel in enumerate(panels, 1):
        axes = figure.add_subplot((len(panels) + 1) // 2, 2, number)
        for curve in panel.curves:
            marker = "o" if len(curve.points) < 30 else ""
            axes.plot(*zip(*curve.points, strict=True), label=curve.name, linewidth=1, marker=marker, markersize=3)
        axes.set_title(panel.title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic.replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
