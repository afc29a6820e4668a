"""A timeline as a section of an HTML page: inline SVG, a bar's facts where the pointer is."""

from collections.abc import Iterator

from jllm.train.records.svg import escape, label, ticks
from jllm.train.records.timeline import COLOURS, WAITING, Lane, Timeline

WIDTH, ROW, GAP = 1280, 24, 6
LEFT, RIGHT, BOTTOM, HEADER = 150, 12, 30, 26
LEAST_WIDTH = 0.3
"""Of a bar: what is narrower is drawn as wide."""
NUMBER_WIDTH = 14
"""Bars that are wider show the number of their micro-batch."""


def section(timeline: Timeline) -> str:
    """The section of a timeline: measured rows above, ideal ones below, on one axis."""
    longest = max(timeline.seconds, timeline.ideal_seconds)
    unit, size = ("s", 1.0) if longest >= 2 else ("ms", 0.001)
    steps = [tick * size for tick in ticks(0.0, longest / size)]
    scale = (WIDTH - LEFT - RIGHT) / steps[-1]
    parts: list[str] = []
    y = 0
    for title, rows in (("measured", timeline.rows), ("ideal schedule", timeline.ideal)):
        parts.append(f'<text x="0" y="{y + HEADER - 9}" class="part">{title}</text>')
        y += HEADER
        for row in rows:
            parts.extend(_row(row, y, scale))
            y += ROW + GAP
    height = y + BOTTOM
    axis = []
    for tick in steps:
        x = LEFT + tick * scale
        axis.append(f'<line class="grid" x1="{x:.1f}" y1="{HEADER}" x2="{x:.1f}" y2="{y}"/>')
        anchor = "end" if tick == steps[-1] else "middle"
        shown = label(tick / size) + (f" {unit}" if tick == steps[-1] else "")
        axis.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="{anchor}">{shown}</text>')
    kinds = "".join(f'<li><i class="box" style="background:{COLOURS[kind]}"></i>{kind}</li>' for kind in COLOURS)
    notes = "".join(f"<li>{escape(note)}</li>" for note in timeline.notes)
    title = escape(timeline.title)
    drawing = (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">{"".join(axis)}{"".join(parts)}</svg>'
    )
    return (
        f'<section class="wide">\n<h2>{title}</h2>\n{drawing}\n<ul>{kinds}<li>nothing: idle</li></ul>\n'
        f'<ul class="notes">{notes}</ul>\n</section>'
    )


def _row(row: Lane, y: int, scale: float) -> Iterator[str]:
    yield f'<text x="{LEFT - 8}" y="{y + ROW - 8}" text-anchor="end">{escape(row.name)}</text>'
    yield f'<rect class="idle" x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{ROW}"/>'
    for bar in row.bars:
        x, width = LEFT + bar.start * scale, max((bar.end - bar.start) * scale, LEAST_WIDTH)
        title = escape(f"{row.name}: {bar.text}")
        yield (
            f'<rect class="bar" x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW}" fill="{COLOURS[bar.kind]}">'
            f"<title>{title}</title></rect>"
        )
        if width > NUMBER_WIDTH and bar.micro_batch is not None and bar.kind != WAITING:
            yield (
                f'<text class="number" x="{x + width / 2:.1f}" y="{y + ROW - 8}" text-anchor="middle">'
                f"{bar.micro_batch}</text>"
            )
