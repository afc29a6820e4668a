"""JSON and TOML of files that somebody else may have written: whatever is in them, a value or a `ValueError`.

The libraries raise other things too: `RecursionError` for brackets in brackets, and for numbers of very many digits an
error of their own. A file larger than anything of its kind is not read at all.

Cost: that of the libraries.
"""

import json
from pathlib import Path
from typing import Any

LARGEST_FILE = 512 << 20
"""Bytes of a file that is read as a whole. The largest that there are, manifests of many files, have some dozen MB."""
_TOO_DEEP = "brackets are nested too deeply"


def loads(text: str | bytes) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def is_nested_beyond(value: Any, levels: int) -> bool:
    """Whether lists and objects of a JSON value lie in one another more than so many levels deep. Nothing calls itself
    here, so a value of any depth has an answer."""
    holders = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        if not holders:
            return False
        inside = (holder.values() if isinstance(holder, dict) else holder for holder in holders)
        holders = [item for items in inside for item in items if isinstance(item, dict | list)]
    return bool(holders)


def read_json(path: Path, *, largest: int = LARGEST_FILE) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON in UTF-8, or is larger than it may be.
    """
    return loads(read_text(path, largest=largest))


def loads_toml(text: str) -> dict[str, Any]:
    """As `tomllib.loads`.

    Raises:
        ValueError: it is no TOML, or nested too deeply.
    """
    import tomllib  # which most commands do not need

    try:
        found = tomllib.loads(text)
        _check_numbers(found)
        return found
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None


def _check_numbers(value: Any) -> None:
    """Raises:
    ValueError: a whole number beyond 64 bits, which TOML does not have; Python reads it, and cannot write it.
    """
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_numbers(each)
    elif isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError("a whole number beyond 64 bits")


def read_text(path: Path, *, largest: int = LARGEST_FILE) -> str:
    """The text of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8, or larger than it may be.
    """
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return data.decode()
