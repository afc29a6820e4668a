"""Footers with their encodings in one order, and not a byte else changed."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jllm.data.dataset.files import FOOTER_TAIL
from jllm.data.spark.footers import settle, with_sorted_encodings

HEAD = bytes([0x19, 0x25])
"""Two encodings: the field before a list of two numbers."""


def footer_and_rest(path: Path) -> tuple[bytes, bytes, bytes]:
    data = path.read_bytes()
    end = len(data) - FOOTER_TAIL
    begin = end - int.from_bytes(data[end : end + 4], "little")
    return data[:begin], data[begin:end], data[end:]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    columns = {"input_ids": [[1, 2], [3]], "text": ["a", None], "n": [1.5, 2.5], "s": [{"a": [1]}, None]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path, use_dictionary=False, row_group_size=1)
    return path


def test_any_order_becomes_one(written: Path) -> None:
    head, footer, tail = footer_and_rest(written)
    for number in range(1, len(footer)):
        if footer[number - 2 : number] == HEAD:
            assert footer[number : number + 2] in (b"\x00\x06", b"\x06\x00"), "plain values, levels in runs"
    places = [i for i in range(2, len(footer)) if footer[i - 2 : i] == HEAD]
    assert len(places) == 2 * 4
    swapped = bytearray(footer)
    for place in random.Random(1).sample(places, 5):
        swapped[place : place + 2] = swapped[place : place + 2][::-1]
    assert with_sorted_encodings(bytes(swapped)) == with_sorted_encodings(footer)
    expected = pq.read_table(written)
    for content in (footer, bytes(swapped)):
        written.write_bytes(head + content + tail)
        settle(written)
        assert footer_and_rest(written) == (head, with_sorted_encodings(footer), tail)
        assert pq.read_table(written).equals(expected)


def test_what_is_not_understood_is_left(written: Path, tmp_path: Path) -> None:
    _, footer, _ = footer_and_rest(written)
    for damaged in (footer[: len(footer) // 2], b"", b"\xff" * 40, footer[:-20] + b"\xff" * 20):
        assert len(with_sorted_encodings(damaged)) == len(damaged)
    other = tmp_path / "b"
    for content in (b"", b"PAR1", b"x" * 50, b"x" * 10 + b"\xff\xff\xff\xffPAR1"):
        other.write_bytes(content)
        settle(other)
        assert other.read_bytes() == content
