"""A file that a full disk does not end: nothing is lost, nothing comes twice, and one warning says it."""

import errno
import os
import random
from pathlib import Path

import pytest

from jllm.train.records import appended_file
from jllm.train.records.appended_file import AppendedFile


def test_what_does_not_fit_is_written_when_there_is_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The disk is full at random moments, in the middle of entries too; each time is said once."""
    real, chance = os.write, random.Random(0)
    room: list[float] = [float("inf")]

    def write(descriptor: int, data: bytes) -> int:
        size = int(min(len(data), room[0]))
        if data and not size:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= size
        return real(descriptor, bytes(data[:size]))

    monkeypatch.setattr(appended_file.os, "write", write)
    warnings: list[str] = []
    file = AppendedFile(tmp_path / "file", warnings.append)
    expected = b""
    for times in range(1, 21):
        room[0] = chance.randrange(200)
        for _ in range(30):
            entry = chance.randbytes(chance.randrange(1, 50))
            expected += entry
            file.append(entry)
            assert expected.startswith((tmp_path / "file").read_bytes())
        assert len(warnings) == times
        room[0] = float("inf")
        file.append(b"")
        assert (tmp_path / "file").read_bytes() == expected
    assert all("No space left on device; what is recorded is kept" in warning for warning in warnings)
    file.close()


def test_a_real_device_without_room(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    (tmp_path / "file").symlink_to("/dev/full")
    warnings: list[str] = []
    file = AppendedFile(tmp_path / "file", warnings.append)
    for _ in range(3):
        file.append(b"entry")
    file.close()
    assert len(warnings) == 1


def test_a_file_that_is_there_goes_on(tmp_path: Path) -> None:
    for text in (b"one", b"two"):
        file = AppendedFile(tmp_path / "file", pytest.fail)
        file.append(text)
        file.close()
    assert (tmp_path / "file").read_bytes() == b"onetwo"
