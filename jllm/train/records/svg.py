"""Line diagrams as one HTML page of inline SVG: no script, no other file, no dependency.

Hovering over a curve's marker shows its step and value where a browser shows SVG titles; colours follow the light or
dark scheme of the reader.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Protocol

WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 12, 30
COLOURS = ("#2f6fde", "#d9622b", "#2a9d5c", "#8b5cc7", "#c43d6b", "#8a7a1f", "#1f9aa8", "#6b7280")
MOST_MARKERS = 60

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 24px auto; max-width: 1320px; padding: 0 16px; }
h1 { font-size: 18px; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 0 0 4px; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 28px; }
svg { width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; }
.grid { stroke: currentColor; opacity: .15; } .curve { fill: none; stroke-width: 1.4; }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; }
i { display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle; }
"""


class CurveLike(Protocol):
    """A named line."""

    @property
    def name(self) -> str: ...
    @property
    def points(self) -> list[tuple[float, float]]: ...


class PanelLike(Protocol):
    """A titled diagram of lines."""

    @property
    def title(self) -> str: ...
    @property
    def curves(self) -> Sequence[CurveLike]: ...


def page(title: str, panels: Iterable[PanelLike]) -> str:
    """The whole HTML page."""
    title = html.escape(title)
    figures = "\n".join(_figure(panel) for panel in panels)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<main>\n{figures}\n</main>\n</body>\n</html>\n"
    )


def _figure(panel: PanelLike) -> str:
    xs = [x for curve in panel.curves for x, _ in curve.points]
    ys = [y for curve in panel.curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low_x, high_x = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    low_y, high_y = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (WIDTH - LEFT - RIGHT) * (x - low_x) / (high_x - low_x),
            HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - low_y) / (high_y - low_y),
        )

    parts = []
    for tick in y_ticks:
        _, y = place(low_x, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, low_y)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{label(tick)}</text>')
    names = []
    for number, curve in enumerate(panel.curves):
        colour = COLOURS[number % len(COLOURS)]
        placed = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in curve.points))
        parts.append(f'<polyline class="curve" stroke="{colour}" points="{placed}"/>')
        if len(curve.points) <= MOST_MARKERS:
            for step, value in curve.points:
                x, y = place(step, value)
                shown = html.escape(f"{curve.name}, step {step:g}: {value:.6g}")
                parts.append(
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"><title>{shown}</title></circle>'
                )
        last = f"{curve.points[-1][1]:.5g}"
        names.append(f'<li><i style="background:{colour}"></i>{html.escape(curve.name)} (last {last})</li>')
    title = html.escape(panel.title)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<section>\n<h2>{title}</h2>\n{drawing}\n<ul>{''.join(names)}</ul>\n</section>"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """At least two round numbers that lie about `low` to `high`, the first and last reaching beyond them."""
    if not high > low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def label(value: float) -> str:
    """12345678 → 12.3M; 0.00001 → 1e-05."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"
