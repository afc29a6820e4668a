"""What is said of records is fit for a terminal."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jllm.data.chat.records.conversation import shown, unused
from jllm.errors import printable

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=values)
def test_values_are_short_and_without_control_codes(value: Any) -> None:
    for text in (shown(value), unused(value)):
        assert text == printable(text)
        assert "\n" not in text
    assert len(shown(value)) <= 48


def test_unused_fields_are_counted_by_their_names() -> None:
    assert unused("context") == "unused field: context"
    assert unused("a\x1b[31m") == "unused field: a\\u001b[31m"
