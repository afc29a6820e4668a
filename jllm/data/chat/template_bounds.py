"""What a chat template may use: time, and the size of what it makes.

A template is a program that somebody else wrote. Loops end by the clock (`Limit`). What makes much at once, outside of
loops, is asked for its size before it is made: products and powers, formats and paddings, joins and replacements, and
the texts that are put together by `~`, by blocks and by the template itself. Sums with `+`, lists and objects are
looked at when they are made, with all that lies in them as often as it lies there, unless a sum is written out at once;
the program of the template calls `kept` for that.

Guarantees: a rendering holds at most some times `LARGEST`, or what its conversation holds.
Cost: a look at each text that is put together, and at each function that is called; for templates that call little
some 5 % of a rendering, and nothing is left of it where the template calls what texts do, which needs no look.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

SECONDS = 10.0
"""Processor time for one rendering: some ten thousand times what an ordinary conversation needs."""
LARGEST_PRODUCT = 10_000_000
"""Letters or items that `*` makes of fewer, and bits of a number that `*` or `**` makes."""
LARGEST = 16 << 20
"""Letters of a text, and bytes of anything else, that a template makes; more where its conversation has more."""
TIMES_THE_INPUT = 16
LONGEST_SUM = 8
"""Operands of `+` in a row that are added without a look."""
_TURNS_BETWEEN_LOOKS = 256
LARGEST_OF_CONSTANTS = 1 << 16
"""The same while a template is compiled, which makes what it can of constants."""
LARGEST_INDENT = 64
_WIDTH = re.compile(r"%[^a-zA-Z%]*?(\*|\d{7,})")
_FIELD_WIDTH = re.compile(r"\{[^{}]*:(?:[^{}]*\d{7,}|[^{}]*\{)")
_NAMESPACE = "Namespace"
"""The class of Jinja's `namespace`, which shows what it holds."""
_PADDING = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))


class Limit:
    """Stops a rendering that does not end.

    `turn` is called by the program of the template for each turn of a loop and each call of a macro; `begin` before
    it runs. Both in the same thread.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._until = 0.0
        self._turns = 0
        self._given: object = None
        self._largest = LARGEST_OF_CONSTANTS

    def begin(self, given: object = None) -> None:
        """A rendering begins; `given` is what it is to show."""
        self._turns, self._given, self._largest = 0, given, LARGEST

    def turn(self) -> None:
        """Raises:
        TimeoutError: the time is over.
        """
        self._turns += 1
        if self._turns % _TURNS_BETWEEN_LOOKS:
            return
        now = time.thread_time()
        if self._turns == _TURNS_BETWEEN_LOOKS:
            self._until = now + self.seconds
        elif now > self._until:
            raise TimeoutError(f"the template ran for more than {self.seconds:g} s on one conversation")

    def require(self, size: int, what: str) -> None:
        """Raises:
        OverflowError: what a template is about to make is larger than it may be.
        """
        if size > self._largest:
            if self._given is not None:  # looked at once, and only where a text is long
                self._largest, self._given = max(LARGEST, TIMES_THE_INPUT * letters_of(self._given)), None
            if size > self._largest:
                raise OverflowError(f"the template makes something too large with {what}")

    def concat(self, texts: Iterable[str]) -> str:
        """As `"".join`, of a bounded size."""
        found: list[str] = []
        size = 0
        for text in texts:
            size += len(text)
            if size > LARGEST:
                self.require(size, "what it puts together")
            found.append(text)
        return "".join(found)

    def buffer(self) -> "Buffer":
        """Where the program puts the texts of a block, one after the other."""
        return Buffer(self)

    def joined(self, values: Sequence[object]) -> str:
        """As `~` joins values."""
        return self.concat(map(str, values))

    def kept(self, value: object) -> object:
        """A value that gets a name."""
        kind = type(value)
        if kind is str:
            if len(value) > LARGEST:  # type: ignore[arg-type]
                self.require(len(value), "what it keeps")  # type: ignore[arg-type]
        elif kind in (list, tuple, dict) or kind.__name__ == _NAMESPACE:
            self._written(value)
        else:
            self.require(sys.getsizeof(value), "what it keeps")
        return value

    def _written(self, value: object) -> int:
        """About how many letters a value is written with; what lies in it twice counts twice.

        Raises:
            OverflowError: more than it may have, as soon as that is seen.
        """
        pending: list[Any] = [value]
        size = 0
        while pending:
            each = pending.pop()
            kind = type(each)
            if kind is str:
                size += len(each)
            elif kind is dict:
                size += 16 * len(each)
                pending += each.values()
            elif kind is list or kind is tuple:
                size += 8 + len(each)
                pending += each
            elif isinstance(each, str | bytes):
                size += len(each)
            else:
                size += 8
                if kind.__name__ == _NAMESPACE:
                    pending.append(getattr(each, f"_{_NAMESPACE}__attrs"))
            if size > self._largest:
                self.require(size, "what it keeps")
        return size

    def called(self, function: Any, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Look at a call of a function that Python has, which may make much at once."""
        owner = getattr(function, "__self__", None)
        if not isinstance(owner, str | bytes | int):
            return
        name = getattr(function, "__name__", "")
        values = [*arguments, *named.values()]
        if name in _PADDING:
            times = max(1, owner.count("\t")) if name == "expandtabs" and isinstance(owner, str) else 1
            self.require(max((width for width in values if isinstance(width, int)), default=0) * times, name)
        elif name == "to_bytes":
            self.require(max((length for length in values if isinstance(length, int)), default=0), name)
        elif name == "replace" and len(values) > 1:
            old, new = values[:2]
            if not (isinstance(owner, str) and isinstance(old, str) and isinstance(new, str)):
                return
            if len(new) > len(old) and (len(owner) + 1) * len(new) > self._largest:
                self.require(len(owner) + owner.count(old) * len(new), name)
        elif name == "join" and values and not isinstance(owner, int):
            self.require_joined(values[0], len(owner))
        elif name == "translate" and isinstance(owner, str):
            parts = (part for table in values if isinstance(table, Mapping) for part in table.values())
            self.require(len(owner) * max((len(str(part)) for part in parts), default=1), name)

    def lipsum(self, known: Callable[..., str]) -> Callable[..., str]:
        """Jinja's maker of text, for some paragraphs."""

        def bounded(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
            self.require(n * max * 16, "lipsum")
            return known(n, html, min, max)

        return bounded

    def require_joined(self, values: object, between: int) -> None:
        """Look at a list of values that is to be joined, with so many letters between them."""
        if isinstance(values, list | tuple | dict):
            size = sum(len(value) for value in values if isinstance(value, str))
            self.require(size + between * len(values), "join")

    def require_format(self, pattern: str, widths: re.Pattern[str] = _FIELD_WIDTH) -> None:
        """Look at a format, whose widths may have some digits, and may not come from elsewhere."""
        if len(pattern) > 2 and widths.search(pattern):
            raise OverflowError("the template makes something too large with a format")

    def require_filled(self, pattern: str, values: object, *, by_braces: bool = False) -> None:
        """Look at a format of "%s" or, `by_braces`, of "{}" that is to be filled with values; each may come as often as
        there are places."""
        self.require_format(pattern, _FIELD_WIDTH if by_braces else _WIDTH)
        parts = (
            list(values.values()) if isinstance(values, Mapping) else list(values) if isinstance(values, tuple) else []
        )
        sizes = [self._written(part) for part in parts]
        places = pattern.count("{") if by_braces else pattern.count("%(")
        self.require(len(pattern) + (places * max(sizes, default=0) if places else sum(sizes)), "a format")

    def operation(self, operator: str, left: Any, right: Any) -> Any:
        """A product, power, format or sum of a size that may be made.

        Raises:
            OverflowError: it would be larger.
        """
        if operator == "+":
            return self.kept(left + right)
        if operator == "%":
            if isinstance(left, str):
                self.require_filled(left, right if isinstance(right, tuple | Mapping) else (right,))
            return left % right
        if isinstance(left, int | float) and isinstance(right, int | float):
            if operator == "**":
                size = left.bit_length() * abs(right) if isinstance(left, int) and isinstance(right, int) else 0
                if size <= LARGEST_PRODUCT:
                    return left**right
            elif not (isinstance(left, int) and isinstance(right, int)) or (
                left.bit_length() + right.bit_length() <= LARGEST_PRODUCT
            ):
                return left * right
        elif operator == "**":
            return left**right  # which only numbers have
        else:
            many, times = (right, left) if isinstance(left, int) else (left, right)
            if not hasattr(many, "__len__") or not isinstance(times, int) or len(many) * times <= LARGEST_PRODUCT:
                return left * right
        raise OverflowError(f"the template makes something too large with {operator}")

    def filters(self, known: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
        """Those of Jinja's filters that make much at once, each with a look before it."""

        def padded(name: str) -> Callable[..., Any]:
            def look(value: Any, *arguments: Any, **named: Any) -> Any:
                times = 1 + (str(value).count("\n") if name == "indent" else 0)
                for width in (*arguments, *named.values()):
                    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
                    self.require(size * times, name)
                return known[name](value, *arguments, **named)

            return look

        def wrapped(environment: Any, value: Any, *arguments: Any, **named: Any) -> Any:
            between = max((len(each) for each in (*arguments, *named.values()) if isinstance(each, str)), default=1)
            self.require(len(str(value)) * (1 + between), "wordwrap")
            return known["wordwrap"](environment, value, *arguments, **named)

        def replaced(context: Any, s: Any, old: Any, new: Any, count: Any = None) -> Any:
            self.called(str(s).replace, [str(old), str(new)], {})
            return known["replace"](context, s, old, new, count)

        def joined(context: Any, value: Any, d: Any = "", attribute: Any = None) -> Any:
            self.require_joined(value, len(str(d)))
            return known["join"](context, value, d, attribute)

        def formatted(value: Any, *arguments: Any, **named: Any) -> Any:
            self.require_filled(str(value), named or arguments)
            return known["format"](value, *arguments, **named)

        found = {name: padded(name) for name in ("center", "indent", "batch", "slice")}
        found |= {"wordwrap": wrapped, "replace": replaced, "join": joined, "format": formatted}
        for name, function in found.items():
            function.__dict__.update(known[name].__dict__)  # what Jinja gives it beside its arguments
        return found


class Buffer(list[str]):
    """Texts whose size is bounded while they come; of a list's methods those that a template's program calls."""

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self._limit, self._size = limit, 0

    def append(self, text: str) -> None:
        self._size += len(text)
        if self._size > LARGEST:
            self._limit.require(self._size, "what it puts together")
        super().append(text)

    def extend(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.append(text)


def letters_of(value: object) -> int:
    """About how many letters a value is written with."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(letters_of(key) + letters_of(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(letters_of, value))
    return 8
