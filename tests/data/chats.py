"""Conversations, templates, and an encoder for one template, for tests."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.rendering import RenderPlan
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.columns import IGNORE_INDEX
from jllm.data.prepare.encoding import ChatEncoder
from jllm.data.sources.chunk import Chunk
from jllm.data.tokenizer.checked_engine import CheckedEngine, open_engine
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.tokenizers_for_tests import make_byte_tokenizer

PLAIN = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"""
THINKING = """{%- for message in messages %}{%- set content = message.content %}{%- set thought = '' %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}
{{- content.lstrip('\\n') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}{{- call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"""
END_OUTSIDE = TEMPLATES["chatml"].replace(
    "{{- '<|im_end|>' }}{%- endgeneration %}", "{%- endgeneration %}{{- '<|im_end|>' }}"
)


@functools.lru_cache(maxsize=4)
def _reference(backend: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(backend)


_known_lengths: dict[str, TokenLengths] = {}
"""By the hash of the backend that they are made of, which takes a second for a real one."""


def _lengths(facts: TokenizerFacts) -> TokenLengths:
    if facts.sha256 not in _known_lengths:
        _known_lengths[facts.sha256] = TokenLengths(facts)
    return _known_lengths[facts.sha256]


class Chat:
    """An encoder for one template."""

    def __init__(self, facts: TokenizerFacts, engine: CheckedEngine, template: str, **plan: Any) -> None:
        assert facts.backend is not None
        self.reference = _reference(facts.backend)
        self.facts = facts
        self.plan = RenderPlan(
            template=template, special_tokens=facts.special_tokens, added=facts.added, date="2026-01-31",
            prefix=facts.prefix, eos_id=facts.eos_id, **plan,
        )  # fmt: skip
        assembler = Assembler(engine=engine, lengths=_lengths(facts))
        self.encoder = ChatEncoder(assembler=assembler, plan=self.plan, formats=("messages",), fields={})

    def encode(
        self, records: list[Any], format_name: str = "messages"
    ) -> tuple[list[list[int]], list[list[int]], list[Any]]:
        return self.encode_as("jsonl", records, format_name)[:3]

    def encode_as(
        self, kind: str, records: list[Any], format_name: str, fields: dict[str, str] | None = None
    ) -> tuple[list[list[int]], list[list[int]], list[Any], dict[str, int]]:
        """Records out of JSON lines, a JSON list or Parquet: ids, labels, the bad ones, and counts."""
        data: Any = [json.dumps(record).encode() for record in records]
        if kind == "jsonl":
            data = b"\n".join(data) + b"\n"
        elif kind == "parquet":
            data = pa.Table.from_pylist(records)
        chunk = Chunk(source=0, index=0, line=1, data=data, end=len(data), end_line=len(records) + 1)
        encoder = dataclasses.replace(self.encoder, formats=(format_name,), fields=fields or {})
        encoded = encoder(chunk, kind)
        documents = encoded.documents
        assert documents.labels is not None
        cuts = documents.offsets[1:-1]
        ids = [part.tolist() for part in np.split(documents.ids, cuts)] if len(documents) else []
        labels = [part.tolist() for part in np.split(documents.labels, cuts)] if len(documents) else []
        return ids, labels, encoded.bad, encoded.counts

    def trained(self, messages: list[dict[str, Any]], **extra: Any) -> str:
        ids, labels, bad = self.encode([{"messages": messages, **extra}])
        assert not bad, bad
        assert all(label in (token, IGNORE_INDEX) for token, label in zip(ids[0], labels[0], strict=True))
        return self.decode(labels[0])

    def decode(self, ids: list[int]) -> str:
        text: str = self.reference.decode([i for i in ids if i != IGNORE_INDEX], skip_special_tokens=False)
        return text


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [user("hello"), assistant("Hi there!")],
    [
        {"role": "system", "content": "Brief."},
        user("naïve café?"),
        assistant("日本語 é"),
        user("a\n\nb"),
        assistant("c"),
    ],
    [
        user(" space "),
        assistant("  indented\n\ncode\n"),
        user("<tag>"),
        assistant("<b>x</b>"),
        user("?"),
        assistant("\nx"),
    ],
    [user("e\u0301 decomposed"), assistant("a\u0308 too"), user("1"), assistant("2"), user("3"), assistant("4" * 50)],
]


TURNS = "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"


END = "{{- '<|im_end|>\\n' }}{%- endfor %}"


def chat_of(folder: Path, template: str, *more: tokenizers.AddedToken, **plan: Any) -> Chat:
    facts = load_tokenizer(str(make_byte_tokenizer(folder, more=more)))
    return Chat(facts, open_engine(facts, inert=True), template, **plan)


def whole(chat: Chat, ids: list[int], text: str) -> bool:
    """Whether these are the ids of the whole text, encoded at once."""
    return bool(ids == chat.reference.encode(text, add_special_tokens=False).ids)


def rendered(messages: list[dict[str, Any]], show: Any = str, end: str = "<|im_end|>") -> str:
    return "".join(f"<|im_start|>{m['role']}\n{show(m['content'])}{end}\n" for m in messages)


AGENT = """{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- set asked = namespace(last=-1) %}
{%- for message in messages if message.role == 'user' %}{%- set asked.last = messages.index(message) %}{%- endfor %}
{%- for message in messages %}{%- if message.role in ('system', 'user', 'tool') %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}
{%- if message.reasoning_content and loop.index0 > asked.last %}
{{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}{%- endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
{{- '\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"""
"""A template of agents: tools, calls, results, and the reasoning behind the last question; no developer."""
ODD = TURNS + "{{- 'odd ' if message.content | length == 41 * 41 }}{{- message.content }}" + END
"""A template that treats texts of `41 * 41` characters in a way that no probe brings out."""
