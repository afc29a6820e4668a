"""Texts that bring out what a chat template does with the texts of messages, beside showing them.

A template may escape a text, look for a word in it, or ask for its beginning or its length. Whatever it looks for
stands in its source as a literal, so the probes are made of those: inside a text, at its beginning, at its end, alone;
and texts that have as many letters, words or lines as its numbers say, one fewer, and one more. Others hold what
filters change: quotes, backslashes, line ends, runs of spaces, capitals, letters beyond ASCII.

Cost: some hundred short conversations rendered, once for each set of roles.
"""

from collections.abc import Iterator
from typing import Any

LONGEST = 20_000
_FIXED = (
    "a",
    "say \"yes\", then 'no'",
    '"quoted"',
    "one\ntwo\n\nthree",
    "one\r\ntwo\tthree",
    "back\\slash \\n {curly} {{two}} {% three %} [square] (round) `code` | pipe",
    "two  spaces   three",
    "UPPER lower Title camelCase",
    "e\u0301t\u00e9 \u6f22\u5b57 \U0001f469\u200d\U0001f467 \ufb01",
    "a & b; c=d%20 > e",
    "- one\n- two",
    "# head",
    "1234567890",
    "true",
    "None",
    "x" * 5000,
    "ALL UPPER",
    "All Title",
    "all lower",
)


def probes_of(environment: Any, source: str) -> list[str]:
    """The probes for a template.

    Args:
        environment: of Jinja, which knows the template's tags.
    """
    return list(dict.fromkeys([*_FIXED, *_of_literals(environment, source)]))


def longest_probed(environment: Any, source: str) -> int | None:
    """How long a text may be whose length is no reason for a template to treat it in its own way, as far as the probes
    tell; None where it may have any length."""
    numbers = [value for value in _literals(environment, source) if isinstance(value, int)]
    return LONGEST if max(numbers, default=0) > LONGEST else None


def _literals(environment: Any, source: str) -> Iterator[Any]:
    from jinja2 import nodes

    for literal in environment.parse(source).find_all(nodes.Const):
        yield literal.value


def _of_literals(environment: Any, source: str) -> Iterator[str]:
    for value in _literals(environment, source):
        if isinstance(value, str) and value:
            yield from (f"a {value} b", f"a{value}b", f"{value} b", f"a {value}", value)
        elif isinstance(value, int) and 1 < value <= LONGEST:
            for length in (value - 1, value, value + 1):
                yield from ("x" * length, " ".join("x" * length), "\n".join("x" * length))
