"""Text sources: documents between blank lines."""

import os
import re
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.sources import text as text_source
from tests.data.source_files import read


def test_blank_lines_may_hold_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff \n\none\r\n  two\r\n \t\r\n\r\nthree\n\u00a0\n\n four \n\n\n".encode())
    assert read(path).values == ["one\r\n  two", "three", " four "]
    assert read(path).lines == [3, 7, 10]


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
texts = st.text(st.sampled_from("ab \t\n\r\x0cé"), max_size=60)


def naive(text: str) -> list[tuple[int, str]]:
    """Documents with the numbers of their first lines: runs of lines that are not blank."""
    found: list[tuple[int, list[str]]] = []
    open_ = False
    for number, line in enumerate(text.split("\n"), 1):
        blank = not line.strip()
        if not blank and not open_:
            found.append((number, []))
        if not blank:
            found[-1][1].append(line)
        open_ = not blank
    return [(number, "\n".join(lines)) for number, lines in found]


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(text=texts.map(lambda text: f"{text}\n"))
def test_documents_are_the_runs_of_lines_that_are_not_blank(text: str) -> None:
    found = text_source.parse(text.encode(), 1)
    wanted = naive(text)
    assert found.lines == [number for number, _ in wanted]
    assert found.values == [document.removesuffix("\r") for _, document in wanted]
    assert not found.bad


@settings(max_examples=4 * EXAMPLES, deadline=None)
@given(text=texts, window=st.integers(1, 60))
def test_a_cut_behind_the_last_boundary_changes_no_document(text: str, window: int) -> None:
    data = text.encode()
    cut = text_source.last_boundary(data, 0, min(window, len(data)))
    assert 0 <= cut <= min(window, len(data))
    head, tail = text_source.parse(data[:cut], 1), text_source.parse(data[cut:], 1 + data[:cut].count(b"\n"))
    whole = text_source.parse(data, 1)
    assert head.values + tail.values == whole.values
    assert head.lines + tail.lines == whole.lines
    if cut == 0:  # there was no blank line to cut behind
        assert not re.search(rb"(?:^|\n)[ \t\r\f\v]*\n", data[: min(window, len(data))])
