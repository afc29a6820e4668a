"""Chat templates as programs: compiled in the environment that they are written for.

`{% generation %}` leaves marks in the text; everything else is what transformers' own environment does.

Guarantees: a template cannot reach anything outside of the sandbox, and ends: a rendering that needs more than
`template_bounds.SECONDS` of processor time is stopped, in whatever thread it runs, and so is one that makes something
too large (`template_bounds.Limit`). Time that others need does not count, so that results do not depend on them.
Cost: some ms to compile; a short call for each turn of a loop. Attributes of dicts, texts and loops, which templates
ask for all the time, do not go through the sandbox's checks.
"""

import datetime
import json
import types
from collections.abc import Callable
from typing import Any

from jllm.data.chat.marks import CLOSE, OPEN
from jllm.data.chat.template_bounds import LARGEST_INDENT, LARGEST_OF_CONSTANTS, LONGEST_SUM, Limit
from jllm.errors import UserError

_TURN, _KEPT = "jllm: a turn of a loop", "jllm: a sum that is kept"
_PLAIN = frozenset((str, bool, int, float, type(None)))
"""Types of values that hold nothing else; of long texts whoever makes them takes care."""
_DICT_ATTRIBUTES = frozenset(dir(dict))
_SAFE_OF_TEXT = frozenset(
    ("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit", "replace", "lower", "upper", "title")
)
_NEVER_LONGER = frozenset(("startswith", "endswith", "strip", "lstrip", "rstrip", "split", "rsplit"))
"""What texts do that makes no more than they are: of a short one it needs no look."""
_SAFE_OF_LOOPS = frozenset(
    ("index", "index0", "revindex", "revindex0", "first", "last", "length", "previtem", "nextitem")
)


def _look_at_sums(source: Any) -> None:
    """Have the program look at every list and object, at every sum that is not written out at once, and at parts of one
    that has many parts."""
    from jinja2 import nodes

    def looked_at(parent: Any, value: Any) -> Any:
        if isinstance(value, nodes.List | nodes.Tuple | nodes.Dict):
            items = list(value.iter_child_nodes())
            is_plain = getattr(value, "ctx", "load") != "load" or all(isinstance(each, nodes.Const) for each in items)
            if is_plain or isinstance(parent, nodes.Call):
                return value
        elif not isinstance(value, nodes.Add):
            return value
        elif isinstance(parent, nodes.Add):
            parts = 1 + getattr(parent, "parts", 0)
            value.parts = parts  # type: ignore[attr-defined]
            if parts % LONGEST_SUM:
                return value
        elif isinstance(parent, nodes.Output):
            return value
        return nodes.Call(nodes.Const(_KEPT), [value], [], None, None).set_lineno(value.lineno)

    pending = [source]
    while pending:
        parent = pending.pop()
        pending += parent.iter_child_nodes()
        for name, value in list(parent.iter_fields()):
            if isinstance(value, list):
                value[:] = [looked_at(parent, each) for each in value]
            elif isinstance(value, nodes.Node):
                setattr(parent, name, looked_at(parent, value))


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
    import jinja2.utils
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
        for space in (indent, *(separators or ())):
            if (space if isinstance(space, int) else len(space or "")) > LARGEST_INDENT:
                raise OverflowError("the template makes something too large with tojson")
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class CodeGenerator(jinja2.compiler.CodeGenerator):
        """Writes the program, with a call at the begin of each turn and around what may grow."""

        def visit_Call(self, node: Any, frame: Any, **more: Any) -> None:  # type: ignore[override]  # noqa: N802
            if isinstance(node.node, nodes.Const) and node.node.value is _KEPT:
                self.write("environment.limit.kept(")
                self.visit(node.args[0], frame)
                self.write(")")
            else:
                super().visit_Call(node, frame, **more)

        def buffer(self, frame: Any) -> None:
            frame.buffer = self.temporary_identifier()
            self.writeline(f"{frame.buffer} = environment.limit.buffer()")

        def visit_Concat(self, node: Any, frame: Any) -> None:  # noqa: N802
            self.write("environment.limit.joined((")
            for each in node.nodes:
                self.visit(each, frame)
                self.write(", ")
            self.write("))")

        def visit_ExprStmt(self, node: Any, frame: Any) -> None:  # noqa: N802 - jinja2's own convention
            if isinstance(node.node, nodes.Const) and node.node.value is _TURN:
                self.writeline("environment.turn()")
            else:
                super().visit_ExprStmt(node, frame)

    class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
        """The sandbox, with short cuts for what templates do all the time and what is always safe."""

        code_generator_class = CodeGenerator
        intercepted_binops = frozenset(("*", "**", "%"))
        limit: Limit
        turn: Callable[[], None]

        def _generate(self, source: Any, *arguments: Any, **named: Any) -> str:
            for repeated in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
                repeated.body.insert(0, nodes.ExprStmt(nodes.Const(_TURN)).set_lineno(repeated.lineno))
            _look_at_sums(source)
            return super()._generate(source, *arguments, **named)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return self.limit.operation(operator, left, right)

        def call(self, context: Any, called: Any, /, *arguments: Any, **named: Any) -> Any:
            if (
                type(called) is types.BuiltinMethodType
                and called.__name__ in _NEVER_LONGER
                and type(called.__self__) is str
                and len(called.__self__) < LARGEST_OF_CONSTANTS
            ):
                named.pop("_loop_vars", None)  # which Jinja gives every call
                named.pop("_block_vars", None)
                return called(*arguments, **named)
            self.limit.called(called, arguments, named)
            made = super().call(context, called, *arguments, **named)
            return made if type(made) in _PLAIN else self.limit.kept(made)

        def wrap_str_format(self, value: Any) -> Any:
            if type(value) in _PLAIN:
                return None
            wrapped: Any = super().wrap_str_format(value)
            if wrapped is None:
                return None

            def filled(*arguments: Any, **named: Any) -> Any:
                given = arguments[0] if value.__name__ == "format_map" and arguments else (*arguments, *named.values())
                self.limit.require_filled(str(value.__self__), given, by_braces=True)
                return wrapped(*arguments, **named)

            return filled

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
    environment.concat = environment.limit.concat  # type: ignore[method-assign]
    environment.filters.update(environment.limit.filters(dict(environment.filters)))
    environment.globals["lipsum"] = environment.limit.lipsum(jinja2.utils.generate_lorem_ipsum)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: date.strftime(pattern)
    try:
        template = environment.from_string(source)
        environment.limit.begin()
        return template
    except Exception as error:  # the compiler runs what it can of the program, and that fails in every way
        reason = " ".join(f"{error}".split()) or type(error).__name__
        raise UserError(f"{named}: not a valid template: {reason[:300]}") from None
