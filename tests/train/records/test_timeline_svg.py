"""A timeline in a page: every bar, with what it is; nothing from elsewhere."""

import html
import re
from pathlib import Path
from xml.etree import ElementTree

from click.testing import CliRunner

from jllm.commands.plot import main
from jllm.train.records.timeline import timeline_of
from tests.train.records.steps import step_of


def test_the_page_has_every_bar(tmp_path: Path) -> None:
    found = step_of(stages=3, micro_batches=4, pipelines=2, transfer=0.1)
    result = CliRunner().invoke(main, [str(found.write(tmp_path))])
    assert result.output.splitlines() == [f"wrote {tmp_path / 'trace-step-5.html'}"]
    text = (tmp_path / "trace-step-5.html").read_text(encoding="utf-8")
    drawing = ElementTree.fromstring(re.findall("<svg.*?</svg>", text, re.DOTALL)[0])
    shown = [str(title.text) for title in drawing.iter("title")]
    timeline = timeline_of(found)
    assert shown == [f"{row.name}: {bar.text}" for row in (*timeline.rows, *timeline.ideal) for bar in row.bars]
    assert all(html.escape(note) in text for note in timeline.notes)
    assert "http" not in text
    assert "<script" not in text
    places = [(float(bar.get("x", 0)), float(bar.get("width", 0))) for bar in drawing.iter("rect")]
    assert all(x >= 150 and x + width <= 1280 for x, width in places)
