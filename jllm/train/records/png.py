"""Curves and timelines as a PNG, by matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from jllm import atomic
from jllm.errors import printable
from jllm.train.records.svg import COLOURS, PanelLike
from jllm.train.records.timeline import COLOURS as KIND_COLOURS
from jllm.train.records.timeline import Timeline

COLUMNS, WIDTH, PANEL_HEIGHT, ROW_HEIGHT, DPI = 2, 12.0, 3.2, 0.35, 110
"""Sizes in inches."""


def write_png(output: Path, title: str, panels: Sequence[PanelLike], timelines: Sequence[Timeline]) -> None:
    """Draw into one file."""
    heights = [PANEL_HEIGHT] * -(-len(panels) // COLUMNS)
    heights += [1.6 + ROW_HEIGHT * (len(each.rows) + len(each.ideal)) for each in timelines]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.6), layout="constrained")
    figure.suptitle(_plain(title))
    grid = figure.add_gridspec(len(heights), COLUMNS, height_ratios=heights)
    for number, panel in enumerate(panels):
        _draw(figure.add_subplot(grid[number // COLUMNS, number % COLUMNS]), panel)
    for number, timeline in enumerate(timelines, len(heights) - len(timelines)):
        _draw_timeline(figure.add_subplot(grid[number, :]), timeline)
    with atomic.replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI)


def _plain(text: str) -> str:
    """A text that matplotlib draws as it is: no formula, no control code."""
    return printable(text).replace("$", r"\$")


def _draw(axes: Any, panel: PanelLike) -> None:
    for curve in panel.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        if curve.raw:
            axes.plot(*zip(*curve.raw, strict=True), color=colour, linewidth=0.8, alpha=0.3)
        marker = ("s" if curve.dashed else "o") if len(curve.points) < 30 else ""
        axes.plot(
            *zip(*curve.points, strict=True),
            label=_plain(curve.name),
            color=colour,
            linewidth=1.2,
            linestyle="--" if curve.dashed else "-",
            marker=marker,
            markersize=3,
        )
    for mark in panel.marks:
        axes.axvline(mark.x, color=COLOURS[mark.colour % len(COLOURS)], linewidth=0.8, linestyle=":")
    axes.set_yscale("log" if panel.log_y else "linear")
    axes.set_xscale("log" if panel.log_x else "linear")
    axes.set_title(_plain(panel.title))
    axes.set_xlabel(_plain(panel.x_title))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_timeline(axes: Any, timeline: Timeline) -> None:
    rows = [*timeline.rows, *timeline.ideal]
    for number, row in enumerate(rows):
        for bar in row.bars:
            width = 1000 * (bar.end - bar.start)
            axes.broken_barh([(1000 * bar.start, width)], (number - 0.4, 0.8), facecolors=KIND_COLOURS[bar.kind])
    axes.set_yticks(range(len(rows)), [_plain(row.name) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(_plain(timeline.title))
    patches = [Patch(color=colour, label=kind) for kind, colour in KIND_COLOURS.items()]
    axes.legend(handles=patches, fontsize=8, ncols=len(patches), loc="upper center", bbox_to_anchor=(0.5, -0.16))
