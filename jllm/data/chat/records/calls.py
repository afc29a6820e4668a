"""Tool calls and tool descriptions, in the one form that templates are given.

Guarantees: arguments are values, not JSON text; a call or a tool that has no such form is refused, never passed on, and
so is one that is nested more than `DEEPEST` levels deep: templates call themselves for every level.
"""

from typing import Any

from jllm.data.chat.records.conversation import BadRecordError, shown
from jllm.data.sources.records import json_type
from jllm.guards import notation

_ARGUMENTS = ("arguments", "parameters", "args", "kwargs", "input")
DEEPEST = 100
"""Levels of lists and objects in a call or a tool: far more than they have, and far fewer than Python can call."""
_KNOWN_OF_CALLS = frozenset(("name", "id", "type", "index", "call_id", "strict", *_ARGUMENTS))


def calls_of(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls given as a list, as one object, or as JSON text of either.

    Raises:
        BadRecordError: they are something else, or one has no name.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{where} has tool calls that are no JSON")
    calls = value if isinstance(value, list) else [value]
    made = [_call(_parsed(call, f"{where} has a tool call that is no JSON"), where) for call in calls]
    _check_depth(made, f"{where} has a tool call")
    return made


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRecordError("wrong type", f"{where} has a tool call without a name")
    assert isinstance(call, dict)
    others = {"function": None, **call} if function is not call else {}
    given = [key for key in _ARGUMENTS if function.get(key) is not None]
    stray = [key for key in function if key not in _KNOWN_OF_CALLS and function[key] not in (None, "", [], {})]
    stray += [key for key in others if key not in ("function", "id", "type", "index", "call_id") and others[key]]
    if stray or len(given) > 1:
        raise BadRecordError(
            "wrong type", f"{where} has a tool call with {shown((stray or given)[-1])}; known are name and arguments"
        )
    arguments = function[given[0]] if given else {}
    if isinstance(arguments, str):
        text = f"{where} has tool arguments that are no JSON"
        arguments = _parsed(arguments, text) if arguments.strip() else {}
    kept = {key: item for key, item in function.items() if key not in _ARGUMENTS}
    outer = call if function is not call else {key: call[key] for key in ("id", "index") if call.get(key) is not None}
    return {**outer, "type": "function", "function": {**kept, "arguments": arguments}}


def tools_of(value: Any, where: str) -> list[Any] | None:
    """Tools given as a list of descriptions, or as JSON text; None where there are none.

    Raises:
        BadRecordError: they are something else, or one has neither a name nor a type of its own.
    """
    if isinstance(value, str):
        value = _parsed(value, f"{where} is text and no JSON") if value.strip() else None
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise BadRecordError("wrong type", f"{where} is {json_type(value)}, not a list")
    tools = [_tool(_parsed(tool, f"{where} has a tool that is no JSON"), where, i) for i, tool in enumerate(value)]
    _check_depth(tools, f"{where} has a tool")
    return tools


def _tool(tool: Any, where: str, number: int) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise BadRecordError("wrong type", f"{where} {number} is {json_type(tool)}, not the description of a tool")
    if "function" not in tool and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": tool}
    described: dict[str, Any] = tool
    function = described.get("function")
    named = isinstance(function, dict) and isinstance(function.get("name"), str)
    if not named and ("function" in tool or not isinstance(tool.get("type"), str) or tool["type"] == "function"):
        raise BadRecordError("wrong type", f"{where} {number} has no name")
    return described


def _check_depth(values: list[Any], what: str) -> None:
    if notation.is_nested_beyond(values, 1 + DEEPEST):
        raise BadRecordError("nested too deep", f"{what} with more than {DEEPEST} levels of lists and objects")


def _parsed(value: Any, mistake: str) -> Any:
    """JSON text as its value; what is no text stays."""
    if not isinstance(value, str):
        return value
    try:
        return notation.loads(value)
    except ValueError:
        raise BadRecordError("wrong type", mistake) from None
