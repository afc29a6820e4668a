"""How chat templates want tool calls.

Records have their arguments as an object (`jllm.data.chat.formats`). Most templates write that as JSON themselves;
some join text to their own, or look whether the content is null.
"""

import json
from collections.abc import Mapping
from typing import Any

WITH_A_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": "a"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call_0001",
                "type": "function",
                "function": {"name": "name_of_tool", "arguments": {"argument": "its_value"}},
            }
        ],
    },
    {"role": "tool", "content": "result_of_tool", "tool_call_id": "call_0001"},
    {"role": "assistant", "content": "b"},
]
"""What shows how a template treats tool calls."""


SAMPLE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "name_of_tool",
            "description": "what it does",
            "parameters": {
                "type": "object",
                "properties": {"argument": {"type": "string", "description": "what it is"}},
                "required": ["argument"],
            },
        },
    }
]
"""The tools for what is found out about a template that is for conversations with tools."""


def calls_as(message: Mapping[str, Any], *, as_text: bool, without_content: bool) -> Mapping[str, Any]:
    """A message with its tool calls written another way: arguments as JSON text, as OpenAI has them, where most
    templates write the object as JSON themselves; and null in place of an empty content. DeepSeek's template wants
    both."""
    if not message.get("tool_calls"):
        return message
    changed = dict(message)
    if as_text:
        changed["tool_calls"] = [
            {**call, "function": {**(given := call["function"]), "arguments": _json(given["arguments"])}}
            for call in message["tool_calls"]
        ]
    if without_content and not message["content"]:
        changed["content"] = None
    return changed


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
