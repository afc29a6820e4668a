"""First bytes: other encodings and compressed files are known by them, and text in UTF-8 is never taken for those."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import first_bytes
from tests.odd_files import COMPRESSIONS

EXAMPLES = 100 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
NAMES = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_text_is_nothing_else(text: str) -> None:
    head = text.encode()[: first_bytes.LOOKED_AT]
    assert first_bytes.mistake(head) is None


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F, exclude_characters="\0\ufeff"), min_size=20))
def test_other_encodings_are_named(text: str) -> None:
    for encoding in ("utf-16", "utf-32"):
        head = text.encode(encoding)[: first_bytes.LOOKED_AT]
        assert first_bytes.found(head) == encoding.upper()
    if text.isascii():
        for encoding in ("utf-16-le", "utf-16-be"):
            assert first_bytes.found(text.encode(encoding)[: first_bytes.LOOKED_AT]) == "UTF-16"


@pytest.mark.parametrize("suffix", list(COMPRESSIONS))
def test_compressed_files_and_their_names(suffix: str) -> None:
    head = COMPRESSIONS[suffix](b"some text\n" * 20)[: first_bytes.LOOKED_AT]
    name = NAMES[suffix]
    assert first_bytes.found(head) == name
    assert f"is {name}" in (first_bytes.mistake(head) or "")


def test_text_that_begins_like_a_mark() -> None:
    assert first_bytes.found(b"BZhang said: hello to all") is None
