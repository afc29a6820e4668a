"""Pages of numbers, texts and lists of texts, which are all columns but lists of numbers.

Pages hold whole rows, about `PAGE_BYTES` of them. A text is its length in 4 bytes and its UTF-8. What is made here is
read by pyarrow.

Cost: a copy for numbers; for text a few passes over its bytes.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm.data.dataset import list_codec
from jllm.data.dataset.columns import Int64, Numbers, bytes_before, text_bytes


def number_pages(values: Numbers) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The pages of a column of numbers, one a row, and how many each has."""
    at_once = max(1, list_codec.PAGE_BYTES // 4)
    for begin in range(0, len(values), at_once):
        page = values[begin : begin + at_once]
        yield np.ascontiguousarray(page).view(np.uint8), len(page)


def text_pages(texts: pa.StringArray, offsets: Int64 | None) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """The pages of a column of texts, or of lists `texts[offsets[i]:offsets[i+1]]`, and how many entries each has."""
    before = bytes_before(texts)
    if offsets is not None:
        before = before[offsets]
    rows = len(before) - 1
    begin = 0
    while begin < rows:
        full = int(np.searchsorted(before, before[begin] + list_codec.PAGE_BYTES))
        end = min(max(full, begin + 1), rows)
        if offsets is None:
            yield _plain(texts.slice(begin, end - begin)), end - begin
        else:
            within = offsets[begin : end + 1]
            first = int(within[0])
            _, continues, has_element = list_codec.entries_of(within - first)
            levels = np.frombuffer(list_codec.levels_of(continues, has_element), dtype=np.uint8)
            values = _plain(texts.slice(first, int(within[-1]) - first))
            yield np.concatenate([levels, values]), len(continues)
        begin = end


def _plain(texts: pa.StringArray) -> NDArray[np.uint8]:
    """Each text behind its length."""
    data, offsets = text_bytes(texts)
    page = np.empty(len(data) + 4 * len(texts), dtype=np.uint8)
    places = (offsets[:-1] + 4 * np.arange(len(texts)))[:, None] + np.arange(4)
    is_length = np.zeros(len(page), dtype=bool)
    is_length[places] = True
    page[places] = np.diff(offsets).astype("<u4").view(np.uint8).reshape(-1, 4)
    page[~is_length] = data
    return page
