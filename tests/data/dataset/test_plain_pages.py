"""Pages of scalars and text are what Parquet's plain encoding says, and hold whole rows."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.dataset import list_codec
from jllm.data.dataset.plain_pages import number_pages, text_pages

TEXTS = st.lists(st.text(max_size=12), max_size=30)


def plain(texts: list[str]) -> bytes:
    """The encoding, a text at a time."""
    return b"".join(len(data).to_bytes(4, "little") + data for data in (text.encode() for text in texts))


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_codec, "PAGE_BYTES", 16)


@given(texts=TEXTS, start=st.integers(0, 3))
def test_texts(texts: list[str], start: int) -> None:
    pages = list(text_pages(pa.array(texts, pa.string()).slice(start), None))
    assert b"".join(page.tobytes() for page, _ in pages) == plain(texts[start:])
    assert sum(count for _, count in pages) == len(texts[start:])


@pytest.mark.usefixtures("small_pages")
def test_a_page_ends_behind_the_row_that_fills_it() -> None:
    texts = ["a" * 12, "b", "c", "dd", "e" * 100, "f"]
    pages = list(text_pages(pa.array(texts), None))
    assert [count for _, count in pages] == [1, 3, 1, 1]
    offsets = np.array([0, 1, 1, 4, 6])
    counts = [count for _, count in text_pages(pa.array(texts), offsets)]
    assert counts == [1, 4, 2], "an empty list is an entry, and a row is never divided"


@pytest.mark.usefixtures("small_pages")
def test_numbers() -> None:
    values = np.arange(10, dtype=np.int32)
    pages = list(number_pages(values))
    assert [count for _, count in pages] == [4, 4, 2]
    assert b"".join(page.tobytes() for page, _ in pages) == values.tobytes()
    assert list(number_pages(values[:0])) == []


@given(rows=st.lists(st.lists(st.text(max_size=12), max_size=4), min_size=1, max_size=20))
def test_lists_of_texts_are_levels_and_the_texts_of_whole_rows(rows: list[list[str]]) -> None:
    texts = pa.array([text for row in rows for text in row], pa.string())
    begin = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_codec, "PAGE_BYTES", 16)
        pages = list(text_pages(texts, np.cumsum([0, *map(len, rows)])))
    for page, count in pages:
        end = begin + 1
        while end < len(rows) and sum(max(1, len(row)) for row in rows[begin:end]) < count:
            end += 1
        continues = [place > 0 for row in rows[begin:end] for place in range(max(1, len(row)))]
        has_element = [bool(row) for row in rows[begin:end] for _ in range(max(1, len(row)))]
        levels = list_codec.levels_of(np.array(continues), None if all(has_element) else np.array(has_element))
        assert page.tobytes() == levels + plain([text for row in rows[begin:end] for text in row])
        begin = end
    assert begin == len(rows)
