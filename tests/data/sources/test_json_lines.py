"""JSON lines: lines are those of `bytes.split`, and are cut behind line ends."""

import json
import os

from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import json_lines

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(rows=st.lists(st.sampled_from([b"", b"1", b'{"a": "\\n"}', b" ", b'"\xe2\x80\xa8"']), max_size=20))
def test_every_line_is_a_value(rows: list[bytes]) -> None:
    data = b"\n".join(rows)
    found = json_lines.parse(data, 10)
    wanted = [(number, json.loads(row)) for number, row in enumerate(rows, 10) if row.strip()]
    assert list(zip(found.lines, found.values, strict=True)) == wanted
    assert json_lines.count_lines(data) == data.count(b"\n")


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.text("ab\n", max_size=30).map(str.encode), window=st.integers(0, 30), searched=st.integers(0, 30))
def test_the_last_boundary_is_behind_a_line_end(data: bytes, window: int, searched: int) -> None:
    searched = min(searched, window)
    ends = [at + 1 for at in range(searched, min(window, len(data))) if data[at : at + 1] == b"\n"]
    assert json_lines.last_boundary(data, searched, window) == max(ends, default=0)
