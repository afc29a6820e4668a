"""What one process asks of all: files, the clock, the age of the process; which of several reasons to end counts."""

from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.machine import parse_duration, process_seconds
from jllm.train.config import TrainConfig
from jllm.train.lifecycle.ending import Ending
from jllm.train.lifecycle.requests import Request, Requests


def requests(folder: Path, *, is_first: bool = True, **more: Any) -> Requests:
    config = TrainConfig(model=Path("model"), train_data=("data",), checkpoint=folder, **more)
    return Requests(config, is_first=is_first, world_size=2)


def test_files_are_seen_once_and_by_the_first_process_alone(tmp_path: Path) -> None:
    first, other = requests(tmp_path), requests(tmp_path, is_first=False)
    for name, wish in (("save", Request.SAVE), ("save_quit", Request.QUIT)):
        (tmp_path / name).touch()
        assert other.now() == Request.NOTHING
        assert first.now() == wish
        assert first.now() == Request.NOTHING
    (tmp_path / "save").mkdir()
    assert first.now() == Request.NOTHING


def test_the_time_limit_counts_from_the_start_of_the_process(tmp_path: Path) -> None:
    age = process_seconds()
    assert requests(tmp_path, time_limit=f"{int(age)}s" if age >= 1 else "1s").now() in (
        Request.TIME_LIMIT,
        Request.NOTHING,
    )
    assert requests(tmp_path, time_limit=f"{int(age) + 3600}s").now() == Request.NOTHING
    assert 0 < age <= process_seconds() < age + 3600


def test_the_first_reason_to_end_counts() -> None:
    assert (Request.QUIT | Request.SAVE).ending is Ending.SAVE_QUIT
    assert (Request.QUIT | Request.TIME_LIMIT).ending is Ending.TIME_LIMIT
    assert (Request.SIGTERM | Request.TIME_LIMIT).ending is Ending.SIGTERM
    assert (Request.SIGTERM | Request.INTERRUPT).ending is Ending.INTERRUPT
    assert (Request.SAVE | Request.WRITING | Request.FAILED).ending is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("23h50m", 85800),
        ("90m", 5400),
        ("1d", 86400),
        ("2d3h4m5s", 183845),
        ("23:50:00", 85800),
        ("1-12:00:00", 129600),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration("--time_limit", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0m", "90", "1.5h", "-1h", "5m2h", "1:2:3", "9" * 20 + "d", "h", "inf"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UserError, match=r"--time_limit .*: give a duration such as 23h50m"):
        parse_duration("--time_limit", text)
