"""PNGs of curves and timelines, where matplotlib is there."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from jllm.commands.plot import main
from tests.train.records.steps import step_of


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="PNG needs matplotlib, which is not installed")
    path = step_of(stages=2, micro_batches=2).write(tmp_path)
    assert CliRunner().invoke(main, [str(path), "-o", str(tmp_path / "x.png")]).exit_code == 0
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
