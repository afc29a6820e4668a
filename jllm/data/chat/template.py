"""Chat templates as programs: compiled in the environment that they are written for.

`{% generation %}` leaves marks in the text; everything else is what transformers' own environment does.

Guarantees: a template cannot reach anything outside of the sandbox.
Cost: some ms to compile; attributes of dicts, texts and loops, which templates ask for all the time, do not go through
the sandbox's checks.
"""

import datetime
import json
from typing import Any

from jllm.data.chat.marks import CLOSE, OPEN
from jllm.errors import UserError

_DICT_ATTRIBUTES = frozenset(dir(dict))
_SAFE_OF_TEXT = frozenset(
    ("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "replace", "lower", "upper", "title")
)
_SAFE_OF_LOOPS = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem")
)


def compile_template(source: str, date: datetime.date) -> Any:
    """A chat template in the environment that templates are written for; `{% generation %}` leaves marks.

    Raises:
        UserError: the template is not valid.
    """
    import jinja2
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

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, with short cuts for what templates do all the time and what is always safe."""

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
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: date.strftime(pattern)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(f"--chat_template: not a valid template: {error}") from None
