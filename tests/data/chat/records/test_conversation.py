"""What is said of records is fit for a terminal."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from jllm.data.chat.records.conversation import kind_of, shown, unused

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=values)
def test_values_are_short_and_without_control_codes(value: Any) -> None:
    for text in (shown(value), kind_of(value), unused(value)):
        assert text.isprintable()
    assert len(shown(value)) <= 48


def test_names_are_those_of_json() -> None:
    named = [kind_of(value) for value in (None, True, False, 1, 0.5, "x", [], {})]
    assert named == ["null", "true", "false", "a number", "a number", "text", "a list", "an object"]
    assert unused("context") == "unused field: context"
    assert unused("a\x1b[31m") == "unused field: 'a\\x1b[31m'"
