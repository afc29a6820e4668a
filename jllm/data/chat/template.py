"""Chat templates as programs: compiled in the environment that they are written for.

`{% generation %}` leaves marks in the text; everything else is what transformers' own environment does.

Guarantees: a template cannot reach anything outside of the sandbox, and ends: a rendering that needs more than
`SECONDS` of processor time is stopped, in whatever thread it runs. Products and powers, which take their time outside
of loops, have a largest size instead. Time that others need does not count, so that results do not depend on them.
Cost: some ms to compile; a short call for each turn of a loop. Attributes of dicts, texts and loops, which templates
ask for all the time, do not go through the sandbox's checks.
"""

import datetime
import json
import time
from collections.abc import Callable
from typing import Any

from jllm.data.chat.marks import CLOSE, OPEN
from jllm.errors import UserError

SECONDS = 10.0
"""Processor time for one rendering: some ten thousand times what an ordinary conversation needs."""
LARGEST_PRODUCT = 10_000_000
"""Letters or items that `*` makes of fewer, and bits of a number that `*` or `**` makes."""
_TURNS_BETWEEN_LOOKS = 256
_TURN = "jllm: a turn of a loop"
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SAFE_OF_TEXT = frozenset(
    ("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "replace", "lower", "upper", "title")
)
_SAFE_OF_LOOPS = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem")
)


class Limit:
    """Stops a rendering that does not end.

    `turn` is called by the program of the template for each turn of a loop and each call of a macro; `begin` before
    it runs. Both in the same thread.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self._until = 0.0
        self._turns = 0

    def begin(self) -> None:
        self._turns = 0

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


def _bounded(operator: str, left: Any, right: Any) -> Any:
    """A product or power of a size that is made at once.

    Raises:
        OverflowError: it would be larger.
    """
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


def compile_template(source: str, date: datetime.date, *, named: str = "--chat_template") -> Any:
    """A chat template in the environment that templates are written for; `{% generation %}` leaves marks.

    Args:
        date: what `strftime_now` shows.
        named: what the template is called where it is not valid.

    Raises:
        UserError: the template is not valid.
    """
    import jinja2
    import jinja2.compiler
    import jinja2.ext
    import jinja2.runtime
    import jinja2.sandbox
    from jinja2 import nodes

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            around = [nodes.Output([nodes.TemplateData(mark)]) for mark in (OPEN, CLOSE)]
            return nodes.Scope([around[0], *body, around[1]]).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class CodeGenerator(jinja2.compiler.CodeGenerator):
        """Writes the program, with a call at the begin of each turn."""

        def visit_ExprStmt(self, node: Any, frame: Any) -> None:  # noqa: N802 - jinja2's own convention
            if isinstance(node.node, nodes.Const) and node.node.value is _TURN:
                self.writeline("environment.turn()")
            else:
                super().visit_ExprStmt(node, frame)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, with short cuts for what templates do all the time and what is always safe."""

        code_generator_class = CodeGenerator
        intercepted_binops = frozenset(("*", "**"))
        limit: Limit
        turn: Callable[[], None]

        def _generate(self, source: Any, *arguments: Any, **named: Any) -> str:
            for repeated in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                repeated.body.insert(0, nodes.ExprStmt(nodes.Const(_TURN)).set_lineno(repeated.lineno))
            return super()._generate(source, *arguments, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return _bounded(operator, left, right)

        def getattr(self, obj: Any, attribute: str) -> Any:
            kind = type(obj)
            if kind is dict and attribute not in _DICT_ATTRIBUTES:
                return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
            if kind is str and attribute in _SAFE_OF_TEXT:
                return getattr(obj, attribute)
            if kind is jinja2.runtime.LoopContext and attribute in _SAFE_OF_LOOPS:
                return getattr(obj, attribute)
            return super().getattr(obj, attribute)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.limit = Limit()
    environment.turn = environment.limit.turn
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: date.strftime(pattern)
    try:
        return environment.from_string(source)
    except Exception as error:  # the compiler runs what it can of the program, and that fails in every way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(f"{named}: not a valid template: {reason[:300]}") from None
