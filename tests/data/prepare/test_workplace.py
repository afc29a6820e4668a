"""The output folder of a run: one run at a time."""

from pathlib import Path

import pytest


def test_a_second_run_waits_its_turn(tmp_path: Path, byte_tokenizer: Path) -> None:
    from jllm.data.prepare.workplace import Workplace
    from jllm.errors import UserError

    second = Workplace(tmp_path / "out").locked()
    with Workplace(tmp_path / "out").locked(), pytest.raises(UserError, match="another run"):
        second.__enter__()
