"""Mistakes are one line without control codes, and so is whatever a file system refuses."""

import errno
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.errors import UserError, of_file_system, printable, say

anything = st.text(st.characters())


@given(anything)
def test_no_control_code_is_left(text: str) -> None:
    shown = printable(text)
    assert not any((ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not set(shown) & set("\u202a\u202e\u2066\u2069\u2028")
    shown.encode()
    assert printable(shown) == shown
    if text.isprintable():
        assert shown == text


@given(anything)
def test_a_mistake_is_one_line(text: str) -> None:
    assert len(str(UserError(text)).splitlines()) <= 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.ELOOP, errno.ENOSPC, errno.ENOTDIR, errno.EFBIG, errno.EROFS])
@given(path=anything)
def test_what_a_file_system_refuses_names_the_path(number: int, path: str) -> None:
    mistake = of_file_system(OSError(number, "whatever", path))
    assert mistake is not None
    assert os.strerror(number) in str(mistake)
    assert " ".join(printable(" ".join(path.split())).split()) in str(mistake)


def test_what_is_no_file_system_stays_a_defect(tmp_path: Path) -> None:
    for other in (OSError("no number"), ConnectionRefusedError(errno.ECONNREFUSED, "x"), OSError(errno.EINVAL, "x")):
        assert of_file_system(other) is None
    assert of_file_system(RuntimeError("no link")) is None
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RuntimeError) as caught:
        (tmp_path / "loop").resolve()
    mistake = of_file_system(caught.value)
    assert mistake is not None
    assert str(tmp_path / "loop") in str(mistake)


def test_a_line_is_written_with_its_end() -> None:
    """Several processes may write to one terminal or file."""
    written: list[str] = []

    class Kept(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    say("a line", "of two parts", file=Kept())
    assert [text for text in written if text] == ["a line of two parts\n"]
