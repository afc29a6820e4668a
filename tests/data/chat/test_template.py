"""Chat templates as programs: what goes wrong in them."""

import datetime
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jinja2
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.formats import read_conversation
from jllm.data.chat.marks import CLOSE, OPEN
from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.rendered import renderer_of
from jllm.data.chat.template import compile_template
from jllm.data.chat.template_bounds import Limit
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError
from tests.data.chats import PLAIN, Chat, assistant, user
from tests.data.raw2ids_runs import raw2ids


def test_template_errors(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    refusing = "{%- if messages|length == 2 %}{{- raise_exception('two only') }}{%- endif %}" + PLAIN
    _, _, bad = Chat(facts, engine, refusing).encode([{"messages": [user("a"), assistant("b")]}])
    assert "two only" in bad[0].detail
    with pytest.raises(UserError, match="not a valid template"):
        Chat(facts, engine, "{% if %}").encode([{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(BadRecordError):
        read_conversation({"messages": [{"role": 3}]}, "messages", {})


DAY = datetime.date(2026, 1, 31)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{% for x in [[1]] * 99 recursive %}" + ENDLESS + "{% endfor %}",
    ],
)
@pytest.mark.parametrize("thread", [False, True])
def test_a_template_ends(source: str, thread: bool) -> None:
    def run() -> str:
        template = compile_template(source, DAY)
        template.environment.limit.seconds = 0.1
        with pytest.raises(TimeoutError, match=r"ran for more than 0\.1 s"):
            template.render()
        template.environment.limit.begin()  # and the next conversation has its own time
        with pytest.raises(TimeoutError):
            template.render()
        return "ended"

    with ThreadPoolExecutor(1) as pool:
        assert (pool.submit(run).result(60) if thread else run()) == "ended"


def test_time_that_passes_elsewhere_does_not_count() -> None:
    template = compile_template("{% for i in range(9999) %}{{ '' if i % 3000 else wait() }}{% endfor %}done", DAY)
    template.environment.limit.seconds = 0.1
    assert template.render(wait=lambda: time.sleep(0.1) or "") == "done"


@settings(max_examples=100, deadline=None)
@given(left=st.integers(-300, 300), right=st.integers(0, 60), text=st.text(max_size=5))
def test_products_and_powers_are_those_of_python(left: int, right: int, text: str) -> None:
    source = "{{ a * b }} {{ a ** b }} {{ c * b }} {{ b * [c] }} {{ 0.5 * b }} {{ 2 ** -b }}"
    wanted = f"{left * right} {left**right} {text * right} {right * [text]} {0.5 * right} {2**-right}"
    assert compile_template(source, DAY).render(a=left, b=right, c=text) == wanted


@pytest.mark.parametrize("source", ["{{ 'a' * 10 ** 12 }}", "{{ 10 ** (10 ** 10) }}", "{{ [1] * x }}", "{{ x * [1] }}"])
def test_products_that_nothing_can_hold_are_refused(source: str) -> None:
    with pytest.raises(OverflowError, match="too large"):
        compile_template(source, DAY).render(x=10**10)


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_does_not_end_is_refused_before_anything_is_made(
    tmp_path: Path, byte_tokenizer: Path, marked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Limit.__init__, "__defaults__", (0.2,))
    (tmp_path / "slow.jinja").write_text(TEMPLATES["chatml"] + ENDLESS if marked else PLAIN + ENDLESS)
    (tmp_path / "chat.jsonl").write_text(json.dumps([{"user": "a"}, {"assistant": "b"}]) + "\n")
    refused = raw2ids(
        "-i", tmp_path / "chat.jsonl", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "--chat_template",
        tmp_path / "slow.jinja", check=False,
    )  # fmt: skip
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "--chat_template: fails on a question and its answer: the template ran for more than" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_template_that_does_not_end_on_a_record_costs_that_record(
    facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    slow = "{% if messages[0].content == 'slow <' %}" + ENDLESS + "{% endif %}" + PLAIN
    chat = Chat(facts, engine, slow)
    renderer = renderer_of(chat.plan)
    renderer.renderer.template.environment.limit.seconds = 0.1
    records = [{"messages": [user(text), assistant("yes")]} for text in ("a", "slow <", "b")]
    ids, _, bad = chat.encode(records)
    assert len(ids) == 2
    assert [(record.kind, record.line) for record in bad] == [("template takes too long", 2)]


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ loop.index0 }}{{ m.role.upper() }}: {{ m['content'] | trim }}\n{% endfor %}",
        "{%- for m in messages if m.content is not none %}\n  {%- if not loop.last %}x{% endif -%}\n{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'é': '<&>'} | tojson }}",
        "{{ messages[0].items() | list | length }}{{ messages[0].missing is defined }}{{ messages[0].get('x', 'y') }}",
        "{% set n = namespace(i=0) %}{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}"
        "{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}{{ eos }}",
        "{{ messages[0].content.split('l')[0].startswith('h') }}{{ messages[0].content.replace('l', 'L') }}",
    ],
)
def test_templates_do_what_they_do_in_transformers(byte_tokenizer: Path, source: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_tokenizer)
    messages = [user("hello é"), assistant("<b>"), {"role": "tool", "content": "3"}]
    wanted = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, eos="</s>")
    assert compile_template(source, DAY).render(messages=messages, eos="</s>") == wanted


def test_generation_leaves_marks_and_dates_are_given() -> None:
    source = "a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }} {{ strftime_now('%d %b %Y') }}"
    assert compile_template(source, DAY).render() == f"a{OPEN}b{CLOSE}False 31 Jan 2026"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ loop.__init__ }}{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    template = compile_template(source, DAY)
    try:
        shown = template.render(messages=[{}])
    except jinja2.TemplateError:
        return
    assert shown == ""
