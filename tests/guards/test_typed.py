"""Fields of dataclasses that were made of JSON are what they are declared as."""

import dataclasses
from typing import Any

import pytest

from jllm.guards.typed import check_fields


@dataclasses.dataclass
class Example:
    count: int = 1
    name: str = "a"
    share: float = 0.5
    flag: bool = False
    maybe: str | None = None
    items: dict[str, Any] = dataclasses.field(default_factory=dict)
    anything: Any = None


@pytest.mark.parametrize(
    "given", [{}, {"share": 1}, {"maybe": "x"}, {"flag": True}, {"items": {"a": 1}}, {"anything": []}]
)
def test_what_fits_is_taken(given: dict[str, Any]) -> None:
    check_fields(Example(**given))


@pytest.mark.parametrize(
    "given",
    [{"count": -1}, {"count": True}, {"count": 1.5}, {"count": "1"}, {"count": None}, {"count": 1 << 63}, {"name": 5},
     {"share": "x"}, {"share": None}, {"flag": 1}, {"maybe": 5}, {"items": []}, {"items": None}],
)  # fmt: skip
def test_what_does_not_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=rf"^{next(iter(given))} is "):
        check_fields(Example(**given))
