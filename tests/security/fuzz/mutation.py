"""Valid files, changed: bytes anywhere, or values of the JSON that they hold."""

import json
import random
from typing import Any

NUMBERS = (-1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, 10**9, 10**30, 10**400, 0.5, -1e300, 1e308)
TEXTS = ("", "../x", "/etc/passwd", "a\0b", "\x1b[2J", "a" * 5000, "1", "NaN", "\u2028", "é")
RAW = (b"1e999999", b"NaN", b"-Infinity", b"9" * 10_000, b"[" * 100_000, b'{"a":' * 5000, b"\xff\xfe", b"\\ud800", b"")
"""What stands in the place of a value in the text itself."""
PLACEHOLDER = "jllm-fuzz-raw-value"


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four places overwritten, cut out, doubled or put in."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        size = min(rng.choice((1, 1, 2, 4, 8, 64, 4096)), len(data) - at)
        piece = data[at : at + size]
        kind = rng.randrange(6)
        if kind == 0:
            piece = bytes(rng.randrange(256) for _ in range(len(piece)))
        elif kind == 1:
            piece = b""
        elif kind == 2:
            piece = piece * rng.choice((2, 3, 200))
        elif kind == 3:
            piece = rng.choice((0, 1, 2**31 - 1, 2**32, 2**63 - 1, 2**64 - 1)).to_bytes(8, "little")
        elif kind == 4:
            piece = rng.choice(RAW) + piece
        else:
            return data[:at]
        data = data[:at] + piece + data[at + size :]
    return data


def changed_value(value: Any, rng: random.Random) -> Any:
    """JSON with one to three of its values replaced, removed, doubled or added."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return odd(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder["colour"] = odd(rng)
        elif kind == 2 and isinstance(holder, list):
            holder.extend([holder[key]] * rng.choice((1, 3, 1000)))
        elif kind == 3:
            other, place = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
        else:
            holder[key] = odd(rng)
    return value


def changed_json(value: Any, rng: random.Random, *, indent: int | None = None) -> bytes:
    """The text of `changed_value`, in which one value may be no JSON at all."""
    text = json.dumps(changed_value(value, rng), indent=indent).encode()
    return text.replace(json.dumps(PLACEHOLDER).encode(), rng.choice(RAW))


def odd(rng: random.Random) -> Any:
    """A value that is rarely what is expected."""
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice(NUMBERS)
    if kind == 1:
        return rng.choice(TEXTS)
    if kind == 2:
        return PLACEHOLDER
    if kind == 3:
        nested: Any = []
        for _ in range(rng.choice((1, 40, 300))):
            nested = [nested] if rng.random() < 0.5 else {"a": nested}
        return nested
    return rng.choice((None, True, False, [], {}, [None], {"a": None}, [[1]], -0.0, "x", 3))


def _keys(holder: Any) -> list[Any]:
    return list(holder) if isinstance(holder, dict) else list(range(len(holder)))


def _places(value: Any) -> Any:
    pending = [value]
    while pending:
        holder = pending.pop()
        if isinstance(holder, dict | list):
            for key in _keys(holder):
                yield holder, key
                pending.append(holder[key])
