"""Chat templates as programs: what goes wrong in them."""

import datetime
from pathlib import Path

import jinja2
import pytest
import transformers

from jllm.data.chat.formats import read_conversation
from jllm.data.chat.marks import CLOSE, OPEN
from jllm.data.chat.records.conversation import BadRecordError
from jllm.data.chat.template import compile_template
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError
from tests.data.chats import PLAIN, Chat, assistant, user


def test_template_errors(facts: TokenizerFacts, engine: CheckedEngine) -> None:
    refusing = "{%- if messages|length == 2 %}{{- raise_exception('two only') }}{%- endif %}" + PLAIN
    _, _, bad = Chat(facts, engine, refusing).encode([{"messages": [user("a"), assistant("b")]}])
    assert "two only" in bad[0].detail
    with pytest.raises(UserError, match="not a valid template"):
        Chat(facts, engine, "{% if %}").encode([{"messages": [user("a"), assistant("b")]}])
    with pytest.raises(BadRecordError):
        read_conversation({"messages": [{"role": 3}]}, "messages", {})


DAY = datetime.date(2026, 1, 31)


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
