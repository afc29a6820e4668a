"""Line diagrams as one HTML page of inline SVG: no script, no other file, no dependency.

Where the pointer is in a diagram, a box shows the values of all its curves there; style sheets alone do that. Colours
follow the light or dark scheme of the reader. Whatever is text of a user's is escaped.
"""

import bisect
import html
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from jllm.errors import printable

WIDTH, HEIGHT = 620, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 12, 44
COLOURS = ("#2f6fde", "#d9622b", "#2a9d5c", "#8b5cc7", "#c43d6b", "#8a7a1f", "#1f9aa8", "#6b7280")
MOST_MARKERS = 60
MOST_COLUMNS = 100
"""Places of a diagram at which values are shown."""
MOST_VALUES = 10
"""Curves whose values a box shows."""
LINE = 15

_STYLE = """
:root { color-scheme: light dark; font: 14px/1.4 system-ui, sans-serif; }
body { margin: 24px auto; max-width: 1320px; padding: 0 16px; }
h1 { font-size: 18px; overflow-wrap: anywhere; } h2 { font-size: 15px; margin: 0 0 4px; }
main { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 28px; }
.wide { grid-column: 1 / -1; }
svg { width: 100%; height: auto; } text { fill: currentColor; font-size: 12px; }
.grid { stroke: currentColor; opacity: .15; } .idle { fill: currentColor; opacity: .06; }
.curve { fill: none; stroke-width: 1.5; } .pale { opacity: .5; stroke-width: 1; } .dashed { stroke-dasharray: 6 3; }
.bar { stroke: Canvas; stroke-width: .5; }
.part { font-weight: 600; } .number { fill: white; font-size: 11px; pointer-events: none; }
.event { stroke-width: 1; stroke-dasharray: 2 3; opacity: .8; }
.at > * { visibility: hidden; } .at > .area { visibility: visible; fill: transparent; pointer-events: all; }
.at:hover > * { visibility: visible; } .at .line { stroke: currentColor; opacity: .5; }
.at .box { fill: Canvas; stroke: currentColor; stroke-opacity: .4; } .at text, .at .box { pointer-events: none; }
ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; }
.notes { display: block; margin-top: 6px; } li { overflow-wrap: anywhere; }
i { display: inline-block; width: 18px; height: 0; border-top: 3px solid; margin-right: 6px; vertical-align: middle; }
i.dash { border-top-style: dashed; } i.box { width: 12px; height: 12px; border: 0; }
"""

Point = tuple[float, float]
Place = Callable[[float, float], Point]


class CurveLike(Protocol):
    """A named line.

    Attributes:
        name: for people.
        points: ascending by x.
        dashed: tells it from others of its kind.
        raw: what it was before smoothing, drawn paler behind it.
        colour: its number.
    """

    @property
    def name(self) -> str: ...
    @property
    def points(self) -> list[Point]: ...
    @property
    def dashed(self) -> bool: ...
    @property
    def raw(self) -> list[Point]: ...
    @property
    def colour(self) -> int: ...


class MarkLike(Protocol):
    """Something that happened at some x."""

    @property
    def x(self) -> float: ...
    @property
    def text(self) -> str: ...
    @property
    def colour(self) -> int: ...


class PanelLike(Protocol):
    """A titled diagram of lines; all that is on a logarithmic axis is above 0."""

    @property
    def title(self) -> str: ...
    @property
    def x_title(self) -> str: ...
    @property
    def curves(self) -> Sequence[CurveLike]: ...
    @property
    def marks(self) -> Sequence[MarkLike]: ...
    @property
    def log_x(self) -> bool: ...
    @property
    def log_y(self) -> bool: ...


def page(title: str, panels: Iterable[PanelLike], sections: Iterable[str] = ()) -> str:
    """The whole HTML page.

    Args:
        title: of it.
        panels: diagrams.
        sections: further ones, drawn already.
    """
    title = escape(title)
    figures = "\n".join([*(_figure(panel) for panel in panels), *sections])
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<main>\n{figures}\n</main>\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    return html.escape(printable(text))


def _figure(panel: PanelLike) -> str:
    points = [point for curve in panel.curves for point in (*curve.points, *curve.raw)]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, to_x = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, is_log=panel.log_x)
    y_ticks, to_y = _axis(min(ys), max(ys), HEIGHT - BOTTOM, TOP, is_log=panel.log_y)

    def place(x: float, y: float) -> Point:
        return to_x(x), to_y(y)

    parts = []
    for tick in y_ticks:
        y = to_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in x_ticks:
        x = to_x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{label(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(panel.x_title)}</text>')
    names = []
    for curve in panel.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        parts.extend(_line(curve, colour, place))
        last = f"{curve.points[-1][1]:.5g}"
        dash = ' class="dash"' if curve.dashed else ""
        names.append(f'<li><i{dash} style="color:{colour}"></i>{escape(curve.name)} (last {last})</li>')
    for mark in panel.marks:
        if min(xs) <= mark.x <= max(xs):
            x, colour = to_x(mark.x), COLOURS[mark.colour % len(COLOURS)]
            parts.append(
                f'<line class="event" stroke="{colour}" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
            )
    parts.extend(_columns(panel, sorted(set(xs)), to_x, place))
    title = escape(panel.title)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
    return f"<section>\n<h2>{title}</h2>\n{drawing}\n<ul>{''.join(names)}</ul>\n</section>"


def _axis(
    low: float, high: float, first: float, last: float, *, is_log: bool
) -> tuple[list[float], Callable[[float], float]]:
    """Its ticks, and where a value is between `first` and `last`."""
    if is_log:
        steps = log_ticks(low, high)
        begin, end = math.log(min(low, steps[0])), math.log(max(high, steps[-1]))
        return steps, lambda value: first + (last - first) * (math.log(value) - begin) / (end - begin)
    steps = ticks(low, high)
    bottom, top = min(low, steps[0]), max(high, steps[-1])
    return steps, lambda value: first + (last - first) * (value - bottom) / (top - bottom)


def _line(curve: CurveLike, colour: str, place: Place) -> Iterator[str]:
    if curve.raw:
        yield f'<polyline class="curve pale" stroke="{colour}" points="{_placed(curve.raw, place)}"/>'
    dashed = " dashed" if curve.dashed else ""
    yield f'<polyline class="curve{dashed}" stroke="{colour}" points="{_placed(curve.points, place)}"/>'
    if len(curve.points) <= MOST_MARKERS:
        for point in curve.points:
            x, y = place(*point)
            if curve.dashed:
                yield f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6" fill="{colour}"/>'
            else:
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'


def _placed(points: Iterable[Point], place: Place) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))


def _columns(panel: PanelLike, xs: Sequence[float], to_x: Callable[[float], float], place: Place) -> Iterator[str]:
    """Stripes of the diagram, each with a box of the values there that is seen while the pointer is in it."""
    chosen: list[float] = []
    for x in xs:
        if not chosen or to_x(x) - to_x(chosen[-1]) >= (WIDTH - LEFT - RIGHT) / MOST_COLUMNS or x == xs[-1]:
            chosen.append(x)
    edges = [LEFT, *((to_x(one) + to_x(other)) / 2 for one, other in itertools.pairwise(chosen))]
    edges.append(WIDTH - RIGHT)
    for number, at in enumerate(chosen):
        low, high = at if number == 0 else chosen[number - 1], at if number + 1 == len(chosen) else chosen[number + 1]
        lines, dots = [(escape(f"{panel.x_title} {_exact(at)}"), "")], []
        for curve in panel.curves:
            point = _nearest(curve.points, at)
            if not low <= point[0] <= high:
                continue
            colour = COLOURS[curve.colour % len(COLOURS)]
            near = "" if point[0] == at else f" (at {_exact(point[0])})"
            lines.append((escape(f"{curve.name}: {point[1]:.6g}{near}"), colour))
            x, y = place(*point)
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
        more = len(lines) - 1 - MOST_VALUES
        if more > 0:
            lines = [*lines[: MOST_VALUES + 1], (f"and {more} more", "")]
        lines += [
            (escape(mark.text), COLOURS[mark.colour % len(COLOURS)])
            for mark in panel.marks
            if edges[number] <= to_x(mark.x) < edges[number + 1]
        ][:3]
        yield _column(edges[number], edges[number + 1], to_x(at), lines, dots)


def _column(left: float, right: float, x: float, lines: list[tuple[str, str]], dots: list[str]) -> str:
    height = LINE * len(lines) + 10
    width = 16 + 6.6 * max(len(html.unescape(text)) for text, _ in lines)
    box_x = x + 10 if x + 10 + width <= WIDTH else max(0.0, x - 10 - width)
    text = "".join(
        f'<text x="{box_x + 8:.1f}" y="{TOP + 6 + LINE * (number + 1)}"'
        f"{f' style={chr(34)}fill:{colour}{chr(34)}' if colour else ''}>{shown}</text>"
        for number, (shown, colour) in enumerate(lines)
    )
    return (
        f'<g class="at"><rect class="area" x="{left:.1f}" y="{TOP}" width="{max(right - left, 0):.1f}"'
        f' height="{HEIGHT - TOP - BOTTOM}"/>'
        f'<line class="line" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>{"".join(dots)}'
        f'<rect class="box" x="{box_x:.1f}" y="{TOP + 2}" width="{width:.0f}" height="{height}" rx="3"/>'
        f"{text}</g>"
    )


def _nearest(points: list[Point], x: float) -> Point:
    place = bisect.bisect_left(points, (x, -math.inf))
    around = points[max(0, place - 1) : place + 1]
    return min(around, key=lambda point: abs(point[0] - x))


def _exact(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


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


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten about `low` to `high`, which are above 0, or round numbers where these lie near each other."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first >= 3:
        every = math.ceil((last - first) / 6)
        return [10.0**power for power in range(first, last + every, every)]
    found = [factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5)]
    below, above = (
        [each for each in found if each <= low * (1 + 1e-9)],
        [each for each in found if each >= high * (1 - 1e-9)],
    )
    begin = below[-1] if below else found[0]
    end = above[0] if above else 10.0 ** (last + 1)
    if begin == end:
        begin, end = begin / 2, end * 2
        return [begin, math.sqrt(begin * end), end]
    return [begin, *(each for each in found if begin < each < end), end]


def label(value: float) -> str:
    """12345678 → 12.3M; 0.00001 → 1e-05."""
    if value == 0:
        return "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"
