"""Whatever is in a file of JSON or TOML, it is a value or a `ValueError`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.guards import notation

ROOT = Path(__file__).resolve().parents[2]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=9)


@given(JSON)
def test_json_is_what_it_is(value: object) -> None:
    assert notation.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "9" * 100_000, "[", "", b"\xff", '"\\ud8"', "{'a': 1}"]
)
def test_what_is_no_json_is_a_value_error(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"."):
        notation.loads(text)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"."):
        notation.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 100_000,
        "a = " + "9" * 100_000,
        "a = 0x" + "f" * 9_000,
        "a = [{b = 0o2" + "0" * 21 + "}]",
        "a",
        "a = 1\na = 2",
    ],
)
def test_what_is_no_toml_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        notation.loads_toml(text)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2]", encoding="utf-8")
    assert notation.read_json(path, largest=6) == [1, 2]
    with pytest.raises(ValueError, match="more than 5 bytes"):
        notation.read_json(path, largest=5)


def test_nothing_else_reads_json_or_toml() -> None:
    """But what was JSON of ours a moment ago."""
    reading = re.compile(r"(?<![.\w])(?:json\.loads?\((?!json\.dumps)|tomllib\.)")
    paths = [path for path in (ROOT / "jllm").rglob("*.py") if path.name != "notation.py"]
    assert not [str(path) for path in paths if reading.search(path.read_text(encoding="utf-8"))]


@given(value=st.recursive(st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_how_deep_a_value_is_nested(value: Any) -> None:
    def depth(item: Any) -> int:
        if not isinstance(item, dict | list):
            return 0
        return 1 + max(map(depth, item.values() if isinstance(item, dict) else item), default=0)

    assert [notation.is_nested_beyond(value, levels) for levels in range(9)] == [depth(value) > n for n in range(9)]
