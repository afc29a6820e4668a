"""Dataclasses that were made of somebody's JSON: whether their fields are what they are declared as.

Cost: a look at each field.
"""

import dataclasses
import types
import typing
from typing import Any

MALFORMED = (AttributeError, KeyError, IndexError, TypeError, ValueError, OverflowError, AssertionError, RecursionError)
"""What reading a value raises where something in it is of another kind than it must be."""


def check_fields(value: Any) -> None:
    """Look at the fields of a dataclass whose types are plain classes, or unions of those.

    Raises:
        TypeError: one is not of its type, or a whole number is below 0.
    """
    for field in dataclasses.fields(value):
        found: Any = getattr(value, field.name)
        members = field.type.__args__ if isinstance(field.type, types.UnionType) else (field.type,)
        allowed: Any = tuple(typing.get_origin(member) or member for member in members)
        if allowed == (Any,):
            continue
        is_number = isinstance(found, int) and not isinstance(found, bool)
        fits = isinstance(found, (*allowed, int) if float in allowed else allowed)
        if not fits or (isinstance(found, bool) and bool not in allowed) or (is_number and not 0 <= found < 1 << 63):
            raise TypeError(f"{field.name} is {found!r:.40}")
