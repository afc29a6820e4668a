"""What a source is: another one in its place is noticed, a copy of it is not."""

import os
import shutil
import time
from pathlib import Path

import pytest

from jllm.data.sources import identity
from jllm.data.sources.identity import is_same, is_same_since, modified_at, record_of
from jllm.data.sources.inputs import resolve


def test_small_files_are_what_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = record_of(resolve([str(path)])[0])
    os.utime(path, ns=(7, 7))
    assert is_same(record_of(resolve([str(path)])[0]), before)
    assert is_same_since(record_of(resolve([str(path)])[0]), before, 0)
    path.write_text("two")
    os.utime(path, ns=(before["modified"], before["modified"]))
    assert not is_same(record_of(resolve([str(path)])[0]), before)
    assert not is_same_since(record_of(resolve([str(path)])[0]), before, time.time_ns())


def test_large_files_are_stretches_of_it_and_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 100)
    monkeypatch.setattr(identity, "_STRETCH", 2)
    path, copy = tmp_path / "a.txt", tmp_path / "b" / "a.txt"
    copy.parent.mkdir()
    path.write_bytes(os.urandom(5000))
    before = record_of(resolve([str(path)])[0])
    made_at = before["changed"]
    assert is_same_since(before, before, made_at)
    shutil.copy2(path, copy)  # with its dates
    assert is_same(record_of(resolve([str(copy)])[0]), before)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    copy.write_bytes(data)
    os.utime(copy, ns=(before["modified"], before["modified"]))
    assert not is_same(record_of(resolve([str(copy)])[0]), before)
    data[0] ^= 1
    data[40] ^= 1  # between two stretches
    time.sleep(0.02)
    copy.write_bytes(data)
    assert not is_same(record_of(resolve([str(copy)])[0]), before)
    os.utime(copy, ns=(5, 5))
    assert not is_same_since(record_of(resolve([str(copy)])[0]), before, made_at), "an older file was put there later"


def test_a_link_that_is_led_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "WHOLE", 1)
    monkeypatch.setattr(identity, "_STRETCH", 1)
    (tmp_path / "file").write_text("some text")
    made_at = time.time_ns()
    time.sleep(0.02)
    (tmp_path / "a.txt").symlink_to("file")
    record = record_of(resolve([str(tmp_path / "a.txt")])[0])
    assert not is_same_since(record, record, made_at)
    assert is_same_since(record, record, time.time_ns())


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert modified_at(str(tmp_path / "file")) == (tmp_path / "file").stat().st_mtime_ns
    assert modified_at("s3://bucket/a") is None
    os.mkfifo(tmp_path / "pipe")
    record = record_of(resolve([str(tmp_path / "pipe")], kind="jsonl")[0])  # which is not waited for
    assert (record["sample"], record["modified"]) == (None, None)
