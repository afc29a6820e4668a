"""JSON of tokenizers: what the standard library reads and writes."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.tokenizer import fast_json

texts = st.text(st.characters())  # with lone surrogates
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(value=values)
def test_there_and_back(value: object) -> None:
    assert fast_json.loads(json.dumps(value)) == value
    assert json.loads(fast_json.dumps(value)) == value


def test_what_is_no_json() -> None:
    for text in ("{", "", b"\xff"):
        with pytest.raises(ValueError, match=r"char|codec|decode"):
            fast_json.loads(text)
