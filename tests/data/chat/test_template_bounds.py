"""What a template makes has a size: what would be too large is refused before it is made, and nothing else changes."""

import datetime
import re
import subprocess
import sys
import time
from pathlib import Path

import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.template import compile_template
from jllm.data.chat.template_bounds import LARGEST, Limit, letters_of

DAY = datetime.date(2026, 1, 31)
DOUBLING = (
    "{% set n = namespace(x='0123456789') %}{% for i in range(60) %}{% set n.x = EXPRESSION %}{% endfor %}{{ n.x }}"
)
MACRO = (
    "{% macro f(x, n) %}{% if n %}{{ f(EXPRESSION, n - 1) }}{% else %}{{ x }}{% endif %}{% endmacro %}{{ f('ab', 50) }}"
)
LARGE = [
    *(DOUBLING.replace("EXPRESSION", f"({value})") for value in (
        "n.x + n.x", "n.x ~ n.x", "[n.x, n.x] | join", "''.join([n.x, n.x])", "n.x.replace('0', n.x)",
        "n.x | replace('0', n.x)", "n.x * 3", "'%s%s' % (n.x, n.x)", "'{}{}'.format(n.x, n.x)", "'{0}{0}'.format(n.x)",
        "'%s%s' | format(n.x, n.x)", "[n.x] + [n.x] + [n.x]", "[n.x, n.x]", "(n.x, n.x)",
        "{'a': n.x, 'b': n.x}", "dict(a=n.x, b=n.x)", "namespace(a=n.x, b=n.x)", "'%(a)s%(a)s' % {'a': n.x}",
        "' '.join(n.x | list)", "(n.x, n.x) | join('-')",
        "n.x.translate({48: n.x})",  "(n.x + n.x) | trim", "n.x | list + n.x | list",
    )),
    *(MACRO.replace("EXPRESSION", value) for value in ("x + x", "x ~ x", "[x, x] | join")),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}0123456789{% endif %}{% endmacro %}{{ f(40) }}",
    "{% set x = 'a' * 9999999 %}{% set y = x" + " + x" * 500 + " %}{{ y }}",
    "{% set x = 'a' * 9999999 %}{{ x" + " + x" * 500 + " }}",
    "{% set x = 'a' * 9999999 %}{{ x" + " ~ x" * 500 + " }}",
    "{% set x = 'a' * 9999999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99) %}{{ x + x + x + x + x + x + x }}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{{ x" + " ~ (x + x + x)" * 500 + " }}",
    "{% set x %}{% for i in range(99) %}{{ 'a' * 9999999 }}{% endfor %}{% endset %}{{ x }}",
    "{{ range(10 ** 9) | list }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a'.center(10 ** 10) }}{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ 'a\t'.expandtabs(10 ** 10) }}",
    "{{ 'a\nb' | indent(10 ** 10) }}",
    "{{ [1] | batch(10 ** 10, 2) | list }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "{{ '{x:>9999999999}'.format_map({'x': 1}) }}",
    "{{ {'a': [1, 2]} | tojson(indent=10 ** 10) }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{{ 5 .to_bytes(10 ** 10, 'big') }}",
    "{{ 'a b' | wordwrap(1, wrapstring='x' * 9999999) }}",
    "{{ 2 ** (10 ** 10) }}",
]  # fmt: skip


def rendered_soon(source: str) -> str:
    template = compile_template(source, DAY)
    template.environment.limit.seconds = 2.0
    text: str = template.render()
    return text


def refuse_all() -> None:
    """The work of a child process: none of them is made, in memory that is measured."""
    for source in LARGE:
        begin = time.perf_counter()
        with pytest.raises(Exception, match=r"large|big|limit|ran for more than|recursion") as refused:
            rendered_soon(source)
        assert refused.type is not MemoryError, source
        assert time.perf_counter() - begin < 60, (source, refused.value)
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert int(peak) < 700 << 10, (source[:300], peak)


def test_what_is_too_large_is_refused_before_it_is_made() -> None:
    command = [sys.executable, "-c", "from tests.data.chat.test_template_bounds import refuse_all; refuse_all()"]
    done = subprocess.run(command, cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


PLAIN = [
    "{{ a + b + a }}{% set c = a + b %}{{ c }}{{ (a + b) | trim }}{{ a ~ b ~ 5 ~ none }}",
    "{{ [a, b] | join(', ') }}{{ ', '.join([a, b]) }}{{ [a] + [b] }}{{ (a, b) + (1,) }}",
    "{{ a.replace('a', b) }}{{ a | replace('a', b) }}{{ a.replace('', 'x') }}{{ a | replace('a', b, 1) }}",
    "{{ '%s: %5d %%' % (a, 7) }}{{ '{}: {:>5}'.format(a, 7) }}{{ '%s %s' | format(a, b) }}{{ 7 % 4 }}{{ -7 % 4 }}",
    "{{ a | center(9) }}|{{ a.ljust(9) }}|{{ a.rjust(9) }}|{{ a.zfill(9) }}|{{ ('a\t' + b).expandtabs(4) }}",
    "{{ (a + '\n' + b) | indent }}{{ (a + '\n' + b) | indent(2, first=true) }}{{ a | wordwrap(3) }}",
    "{% for x in [1, 2, 3, 4, 5] | batch(2, 0) %}{{ x }}{% endfor %}",
    "{% for x in [1, 2, 3] | slice(2) %}{{ x }}{% endfor %}",
    "{% macro f(x, y=a + b) %}{{ x + y }}{{ caller() if caller }}{% endmacro %}{{ f(a) }}"
    "{% call f(b) %}{{ a + b }}{% endcall %}",
    "{% set x %}{{ a }}{{ b + a }}{% endset %}{{ x + a }}{% filter upper %}{{ a + b }}{% endfilter %}",
    "{{ a + b" + " + a" * 100 + " }}{% set z = a + b" + " + a" * 100 + " %}{{ z }}",
    "{% if a + b == b + a %}same{% else %}{{ [a + b, b + a] | sort | first }}{% endif %}{{ {'k': a + b}['k'] }}",
    "{{ a.split('a') }}{{ a.rsplit(None, 1) }}{{ a.split(sep='a', maxsplit=1)[-1].lstrip(b).rstrip('b').strip() }}",
    "{{ a.startswith(b) }}{{ b.endswith(('a', 'b')) }}{% for c in b %}{{ c.strip('a') }}{{ a.split(c) }}{% endfor %}",
    "{% block t %}{{ a.strip() }}{% endblock %}{% set n = namespace(x=a, f=b.split) %}{{ n.f('a') }}{{ n.x.strip(b) }}",
    "{% for c in a + b %}{{ c + '.' }}{{ loop.cycle(a, b) }}{% endfor %}{{ 'x' if (a + b) | length > 3 else 'y' + b }}",
]  # fmt: skip


BOTH = [
    (
        compile_template(source, DAY),
        jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        ).from_string(source),
    )
    for source in PLAIN
]


@settings(max_examples=30, deadline=None)
@given(a=st.text(max_size=8), b=st.text("ab \n<", max_size=6))
def test_all_else_is_as_in_jinja(a: str, b: str) -> None:
    for ours, plain in BOTH:
        assert ours.render(a=a, b=b) == plain.render(a=a, b=b)


def test_a_long_conversation_may_be_shown_several_times() -> None:
    template = compile_template("{% set x = text + text %}{{ x ~ x }}", DAY)
    text = "a" * (LARGEST // 2)
    limit: Limit = template.environment.limit
    limit.begin([{"content": text}])
    assert len(template.render(text=text)) == 4 * len(text)
    limit.begin([])
    with pytest.raises(OverflowError, match="too large"):
        template.render(text=text)
    assert letters_of([{"ab": ["cd", ("e", 1)]}]) == 13
