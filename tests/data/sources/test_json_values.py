"""JSON values: those of the standard library, each alone."""

import json
import os
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_values

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)
broken = st.sampled_from([b"{oops", b"\xff\xfe", b'"\\ud800"', b"[1,", b"nul"])


@settings(max_examples=EXAMPLES, deadline=None)
@given(items=st.lists(values.map(json.dumps).map(str.encode) | broken | st.just(b"  \t"), max_size=12))
def test_good_values_come_out_and_bad_ones_are_told(items: list[bytes]) -> None:
    found = json_values.parse(items, range(5, 5 + len(items)))
    wanted: list[tuple[int, Any]] = []
    bad: list[int] = []
    for number, item in enumerate(items, 5):
        try:
            wanted.append((number, json.loads(item)))
            json.dumps(wanted[-1][1], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            wanted.pop()
            bad.append(number)
        except ValueError:
            bad += [number] if item.strip() else []
    assert list(zip(found.lines, found.values, strict=True)) == wanted
    assert [record.line for record in found.bad] == bad


def test_what_the_standard_library_reads_is_read() -> None:
    rows = [b"NaN", b"1" * 400, b"[" * 2000 + b"]" * 2000]
    found = json_values.parse(rows, [1, 2, 3])
    assert str(found.values[0]) == "nan"
    assert found.values[1] == int("1" * 400)
    assert [record.kind for record in found.bad] in ([], ["bad JSON"])  # how deep it goes is the interpreter's
    detail = json_values.parse([b"\xffx"], [9]).bad[0]
    assert (detail.kind, detail.line) == ("not UTF-8", 9)


def test_a_byte_order_mark_is_no_part_of_a_value() -> None:
    """Where a file with one was put behind another."""
    found = json_values.parse([b'{"a": 1}', b'\xef\xbb\xbf{"a": 2}'], range(1, 3))
    assert (found.values, found.bad) == ([{"a": 1}, {"a": 2}], [])
