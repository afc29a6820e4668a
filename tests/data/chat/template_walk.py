"""The walk over tokenizers and templates: what is shown of everything that a conversation may have, against
transformers' own rendering of the same messages.

`outcomes` says for one tokenizer and one template what becomes of each case; `table` is docs/templates.md.
"""

import dataclasses
import datetime
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import auto_tokenizer, load_tokenizer
from tests.data.chats import Chat, assistant, user

OWN = "its own"
FAMILIES = {"qwen3": "qwen3", "llama-3": "llama3_1", "gemma": "gemma3"}
"""Built-in template → the tokenizer, among the real ones, whose own template is the family's published one."""
DAY = datetime.date(2026, 1, 31)


def _call(word: str) -> dict[str, Any]:
    function = {"name": f"call_{word}", "arguments": {"place": f"arg{word}", "days": [1, 2]}}
    return {"id": f"call_{word}", "type": "function", "function": function}


def _tool(word: str, text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": f"call_{word}", "name": f"call_{word}"}


_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "call_one",
            "description": "what-it-does",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
CASES: dict[str, dict[str, Any]] = {
    "question, answer": {"messages": [user("asked1"), assistant("told1"), user("asked2"), assistant("told2")]},
    "system": {"messages": [{"role": "system", "content": "rule1"}, user("asked1"), assistant("told1")]},
    "developer": {"messages": [{"role": "developer", "content": "rule1"}, user("asked1"), assistant("told1")]},
    "tools": {"messages": [user("asked1"), assistant("told1")], "tools": _TOOLS},
    "a call, its result": {
        "messages": [
            user("asked1"), assistant("", tool_calls=[_call("one")]), _tool("one", "result1"), assistant("told1")
        ],
        "tools": _TOOLS,
    },
    "text beside a call": {
        "messages": [
            user("asked1"), assistant("told1", tool_calls=[_call("one")]), _tool("one", "result1"), assistant("told2")
        ]
    },
    "calls in parallel": {
        "messages": [
            user("asked1"), assistant("", tool_calls=[_call("one"), _call("two")]), _tool("one", "result1"),
            _tool("two", "result2"), assistant("told1"), user("asked2"), assistant("told2"),
        ]
    },
    "reasoning": {"messages": [user("asked1"), assistant("told1", reasoning_content="thought1")]},
    "reasoning before a call": {
        "messages": [
            user("asked1"), assistant("", reasoning_content="thought1", tool_calls=[_call("one")]),
            _tool("one", "result1"), assistant("told1", reasoning_content="thought2"),
        ]
    },
    "reasoning of an earlier turn": {
        "messages": [
            user("asked1"), assistant("told1", reasoning_content="thought1"), user("asked2"),
            assistant("told2", reasoning_content="thought2"),
        ]
    },
    "think tags in the text": {
        "messages": [user("asked1"), assistant("<think>\nthought1\n</think>\n\ntold1")]
    },
    "two questions in a row": {"messages": [user("asked1"), user("asked2"), assistant("told1")]},
    "two answers in a row": {"messages": [user("asked1"), assistant("told1"), assistant("told2")]},
    "an empty answer": {"messages": [user("asked1"), assistant(""), user("asked2"), assistant("told2")]},
    "white space around": {
        "messages": [{"role": "system", "content": " rule1 "}, user("\nasked1 "), assistant("  told1\n")]
    },
}  # fmt: skip
WORDS = re.compile(r"(?:asked|told|rule|result|thought)\d|call_(?:one|two)|arg(?:one|two)|what-it-does")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What becomes of one case.

    Attributes:
        result: "equal" to what transformers shows, "refused" by name, or "differs".
        detail: how the messages were read, or why they are refused.
        left_out: texts of the record that are not shown, though nothing was refused.
    """

    result: str
    detail: str = ""
    left_out: tuple[str, ...] = ()


def readings(messages: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The ways in which jllm may read messages, each with its name."""
    as_system = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
    for named, given in (("", list(messages)), ("as system", as_system)):
        yield named, given
        for join in ("", "\n\n"):
            joined: list[dict[str, Any]] = []
            for _, group in itertools.groupby(given, lambda each: (each["role"], len(each) == 2)):
                several = list(group)
                is_plain = len(several[0]) == 2
                text = join.join(each["content"] for each in several)
                joined += [{**several[0], "content": text}] if is_plain else several
            if len(joined) < len(given):
                yield "joined", joined


def outcomes(chat: Chat, tokenizer: Any, source: str) -> dict[str, Outcome]:
    """What becomes of each case.

    Args:
        chat: our encoder for the template.
        tokenizer: transformers' own.
        source: of the template.
    """
    found = {}
    for name, record in CASES.items():
        ids, _, bad = chat.encode([record])
        if bad:
            found[name] = Outcome(result="refused", detail=bad[0].detail.removeprefix("TemplateError: "))
            continue
        found[name] = Outcome(result="differs")
        for read, messages in readings(record["messages"]):
            text = shown(tokenizer, source, messages, record.get("tools"))
            if text is not None and chat.reference.encode(text, add_special_tokens=False).ids == ids[0]:
                left_out = dict.fromkeys(word for word in WORDS.findall(str(record)) if word not in text)
                found[name] = Outcome(result="equal", detail=read, left_out=tuple(left_out))
                break
    return found


def shown(tokenizer: Any, source: str, messages: list[dict[str, Any]], tools: list[Any] | None) -> str | None:
    """What transformers makes of messages; None where the template refuses them."""
    dated = re.sub(r"strftime_now\(['\"]([^'\"]*)['\"]\)", lambda match: repr(DAY.strftime(match[1])), source)
    try:
        text: str = tokenizer.apply_chat_template(messages, tools=tools, chat_template=dated, tokenize=False)
    except Exception:  # templates are programs: they fail in every way
        return None
    return text


def walk(folder: Path) -> dict[str, dict[str, Outcome]]:
    """Template → case → what becomes of it with the tokenizer of this folder."""
    facts = load_tokenizer(str(folder))
    engine = open_engine(facts, inert=True)
    tokenizer = auto_tokenizer(str(folder), trust_remote_code=False)
    sources = {OWN: facts.chat_template, **TEMPLATES}
    return {
        name: outcomes(Chat(facts, engine, source), tokenizer, source)
        for name, source in sources.items()
        if source is not None
    }


def section(folder: Path, found: dict[str, dict[str, Outcome]]) -> str:
    """The part of docs/templates.md about one tokenizer."""
    names = list(found)
    lines = [f"## {folder.name}", "", f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    lines += [f"| {case} | {' | '.join(_cell(found[name][case]) for name in names)} |" for case in CASES]
    lines.append("")
    for name in names:
        refused = [each.detail for each in found[name].values() if each.result == "refused"]
        reasons = list(dict.fromkeys(each.removeprefix(f"the template {name} ") for each in refused))
        if reasons:
            lines.append(f"* **{name}** refuses: {'; '.join(reasons)}")
    return "\n".join([*lines, ""])


def _cell(outcome: Outcome) -> str:
    if outcome.result != "equal":
        return outcome.result
    left_out = f"without {', '.join(outcome.left_out)}" if outcome.left_out else ""
    return ", ".join(["equal", *filter(None, (outcome.detail, left_out))])
