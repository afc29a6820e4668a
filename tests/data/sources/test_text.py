"""Text sources: documents between blank lines."""

from pathlib import Path

from tests.data.source_files import read


def test_blank_lines_may_hold_white_space(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff \n\none\r\n  two\r\n \t\r\n\r\nthree\n\u00a0\n\n four \n\n\n".encode())
    assert read(path).values == ["one\r\n  two", "three", " four "]
    assert read(path).lines == [3, 7, 10]
