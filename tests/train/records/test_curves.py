"""`jllm plot`: real records in, one file out; a user's mistake is one line."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from jllm.commands.plot import main
from jllm.train.records.curves import Look, panels_of, read_records, thinned
from jllm.train.records.metrics import Recorder
from jllm.train.records.svg import label, log_ticks, ticks


def record_run(folder: Path, steps: int = 40, *, slope: float = 0.05) -> Path:
    """A run's records, written by the trainer's own recorder."""
    recorder = Recorder(folder, enabled=True, total_steps=steps, first_step=1, steps_per_print=1000)
    for step in range(steps + 1):
        if step:
            loss: Any = None if step == 7 else float("nan") if step == 8 else 5 - slope * step
            recorder.train(
                {"step": step, "epoch": step / steps, "loss": loss, "lr": 1e-4 / step, "grad_norm": 1.0 + step % 3}
                | {"tokens_per_second": 1e6, "seconds": 0.1, "mfu": None, "data_wait": 0.0, "memory_mib": [1]}
            )
        if step % 20 == 0:
            for name in ("web", "code"):
                recorder.evaluation(
                    {"step": step, "name": name, "eval_loss": 5 - slope * step, "eval_tokens": 10, "perplexity": 2.0}
                    | {"accuracy": 0.1, "seconds": 0.1}
                )
    recorder.close()
    return folder


TITLES = [
    *("loss", "accuracy", "learning rate", "gradient norm", "tokens / s", "seconds a step"),
    *("share of a step that waits for data", "peak memory, MiB"),
]
"""The diagrams of such a run: of what it has any number of."""


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_the_page_draws_every_curve(tmp_path: Path) -> None:
    record_run(tmp_path / "run/log")
    result = run(tmp_path / "run")
    page = tmp_path / "run/log/plot.html"
    assert result.output.splitlines()[-1] == f"wrote {page}"
    text = page.read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == TITLES
    for name in ("train", "eval web", "eval code"):
        assert f"</i>{name} (last" in text
    assert "http" not in text
    assert "<script" not in text
    drawings = [ElementTree.fromstring(part) for part in re.findall("<svg.*?</svg>", text, re.DOTALL)]
    points = [[len(str(line.get("points")).split()) for line in d.iter("polyline")] for d in drawings]
    assert points == [[38, 3, 3], [3, 3], *[[40]] * 6]
    for drawing in drawings:
        _, _, width, height = map(float, str(drawing.get("viewBox")).split())
        for line in drawing.iter("polyline"):
            places = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
            assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    record_run(tmp_path / "one/log")
    record_run(tmp_path / "two/log", slope=0.1)
    result = run(tmp_path / "one/log", tmp_path / "two/log/metrics.jsonl", "-o", tmp_path / "both.html")
    assert result.exit_code == 0
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "one train" in text
    assert "two eval code" in text


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="PNG needs matplotlib, which is not installed")
    record_run(tmp_path / "log")
    assert run(tmp_path / "log", "-o", tmp_path / "run.png").exit_code == 0
    assert (tmp_path / "run.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_a_line_still_being_written_ends_the_records(tmp_path: Path) -> None:
    path = record_run(tmp_path, 3) / "metrics.jsonl"
    whole = read_records(path)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert read_records(path) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no metrics.jsonl there or in its log folder"),
        ("", "no records yet; wait for the first step"),
        ('{"loss": 1}\n{"step": 1}\n', "metrics.jsonl:1: not a record with a step"),
        ("[1]\n{}\n", "metrics.jsonl:1: not a record with a step"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    result = run(tmp_path)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_other_mistakes(tmp_path: Path) -> None:
    record_run(tmp_path / "log", 3)
    assert 'must end in ".html" or ".png"' in run(tmp_path, "-o", "x.pdf").output
    assert "given twice" in run(tmp_path, tmp_path / "log").output
    (tmp_path / "file").write_text("")
    assert "cannot be written" in run(tmp_path, "-o", tmp_path / "file/x.html").output


def test_a_run_of_one_step_and_unusual_values(tmp_path: Path) -> None:
    lines = [{"step": 1, "loss": 2.0, "lr": 0.0, "grad_norm": "inf", "tokens_per_second": 5e12}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(tmp_path).exit_code == 0
    titles = re.findall("<h2>(.*?)</h2>", (tmp_path / "plot.html").read_text(encoding="utf-8"))
    assert titles == ["loss", "learning rate", "tokens / s"]


def drawings_of(page: Path) -> list[ElementTree.Element]:
    text = page.read_text(encoding="utf-8")
    return [ElementTree.fromstring(part) for part in re.findall("<svg.*?</svg>", text, re.DOTALL)]


def test_hovering_shows_the_values_of_all_curves(tmp_path: Path) -> None:
    """Everywhere in a diagram, by style sheets alone: one stripe and one box for each place."""
    record_run(tmp_path / "log")
    assert run(tmp_path / "log").exit_code == 0
    loss = drawings_of(tmp_path / "log/plot.html")[0]
    stripes = [group for group in loss.iter("g") if group.get("class") == "at"]
    areas = [
        (float(area.get("x", 0)), float(area.get("width", 0)))
        for group in stripes
        for area in group
        if area.get("class") == "area"
    ]
    assert len(areas) == len(stripes) == 39  # steps 0 to 40 without 7 and 8, where only training has no value
    assert sum(width for _, width in areas) == pytest.approx(620 - 70 - 12, abs=0.1 * len(areas))
    at_20 = [[text.text for text in group.iter("text")] for group in stripes][20 - 2]
    assert at_20 == ["step 20", "train: 4", "eval web: 4", "eval code: 4"]


def test_smoothing_keeps_what_was_measured(tmp_path: Path) -> None:
    """A mean of all values so far, the newest weighing most; evaluations are not smoothed."""
    records = read_records(record_run(tmp_path / "log") / "metrics.jsonl")
    [loss, *_] = panels_of({"run": records}, Look(smooth=0.5))
    [plain, *_] = panels_of({"run": records})
    train = loss.curves[0]
    assert train.raw == plain.curves[0].points
    values = [value for _, value in train.raw]
    for place, (_, smoothed) in enumerate(train.points):
        weights = [0.5 ** (place - before) for before in range(place + 1)]
        mean = sum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights)
        assert smoothed == pytest.approx(mean)
    assert loss.curves[1:] == plain.curves[1:]
    assert run(tmp_path / "log", "--smooth", "1").exit_code == 2


@pytest.mark.parametrize("axis", ["step", "tokens", "hours"])
def test_axes(tmp_path: Path, axis: str) -> None:
    lines: list[dict[str, Any]] = [{"step": 0, "name": "web", "eval_loss": 3.0, "time": "2026-01-01T00:00:00.000Z"}]
    for step in range(1, 101):
        time = f"2026-01-01T{step // 60:02d}:{step % 60:02d}:00.000Z"
        lines.append({"step": step, "loss": 10.0 / step, "consumed_tokens": 1000 * step, "time": time, "lr": 0.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scale = {"step": 1.0, "tokens": 1000.0, "hours": 1 / 60}[axis]
    [loss, _] = panels_of({"run": lines}, Look(x=axis))
    assert [x for x, _ in loss.curves[0].points] == pytest.approx([scale * step for step in range(1, 101)])
    assert loss.curves[1].points == [(0.0, 3.0)]
    # What is 0 is on no logarithmic axis; equal factors are equally far apart there.
    [only] = panels_of({"run": lines}, Look(x=axis, log_x=True, log_y=True))
    assert [len(curve.points) for curve in only.curves] == [100]
    assert run(tmp_path, "--x", axis, "--log_x", "--log_y").exit_code == 0
    [drawing] = drawings_of(tmp_path / "plot.html")
    [line] = drawing.iter("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in str(line.get("points")).split()]
    for part in (0, 1):
        moved = [places[2 * step - 1][part] - places[step - 1][part] for step in (1, 2, 5, 10, 50)]
        assert moved == pytest.approx([moved[0]] * 5, abs=0.21)
        assert moved[0]


def test_stages_events_and_names_that_are_no_text(tmp_path: Path) -> None:
    """A curve for each stage; events are marked; whatever a run calls itself is text in the page."""
    name = '<script>"&\x1b</title>'
    lines: list[dict[str, Any]] = [
        {"event": "start", "step": 0, "run": "x"},
        *({"step": step, "loss": 1.0, "memory_mib": [step, 2 * step]} for step in range(1, 6)),
        {"event": "resume", "step": 2, "loss": 9.0},
        {"step": 5, "name": name, "eval_loss": 1.0, "loss_p50": 0.5, "loss_p90": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loss, quantiles, memory = panels_of({"run": lines})
    assert [mark.text for mark in loss.marks] == ["run: resume after step 2"]
    assert [curve.name for curve in quantiles.curves] == [f"eval {name} p50", f"eval {name} p90"]
    assert [curve.points[-1] for curve in memory.curves] == [(5, 5), (5, 10)]
    assert run(tmp_path).exit_code == 0
    text = (tmp_path / "plot.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "\x1b" not in text
    assert html.escape(name.replace("\x1b", "\\x1b")) in text
    assert len(drawings_of(tmp_path / "plot.html")) == 3


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(i), 1.0) for i in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thinned(points)
    assert len(kept) <= 2100
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert points[54_321] in kept
    assert kept == sorted(kept)
    assert panels_of({"run": [{"step": 1, "loss": None}]}) == []


def test_ticks_and_labels() -> None:
    for low, high in ((0, 1), (3.2, 3.3), (-5, 1e9), (2, 2), (0, 0), (1e-7, 3e-5)):
        found = ticks(low, high)
        assert found[0] <= low + 1e-12
        assert found[-1] >= high - 1e-12
        assert 2 <= len(found) <= 8
    for low, high in ((1, 1e9), (3.2, 3.3), (2, 2), (1e-7, 3e-5), (10, 100), (5, 5.0001), (1, 1)):
        found = log_ticks(low, high)
        assert found[0] <= low * (1 + 1e-9)
        assert found[-1] >= high * (1 - 1e-9)
        assert 2 <= len(found) <= 9
        assert found == sorted(set(found))
    assert [label(v) for v in (0, 1e-5, 0.25, 1200, 45_000, 2.5e6)] == ["0", "1e-05", "0.25", "1200", "45k", "2.5M"]


def test_the_command_starts_quickly_without_torch() -> None:
    heavy = ("torch", "matplotlib", "numpy")
    code = f"import sys, jllm.plot, jllm.train.records.svg; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
