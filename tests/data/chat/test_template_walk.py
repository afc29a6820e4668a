"""All tokenizers at hand with all built-in templates: equal to transformers, or refused by name; docs/templates.md."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.tokenizer.facts import auto_tokenizer
from tests.data.chat.template_walk import CASES, FAMILIES, OWN, Outcome, section, shown, walk
from tests.data.chats import assistant, user
from tests.data.tokenizers_for_tests import asset_tokenizer, asset_tokenizers

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "templates.md"


def _require_nothing_lost(found: dict[str, dict[str, Outcome]]) -> None:
    for template, cases in found.items():
        for case, outcome in cases.items():
            assert outcome.result in ("equal", "refused"), (template, case)
            if outcome.result == "refused":
                by_template = template == OWN or outcome.detail.startswith(f"the template {template} ")
                assert by_template or case == "an empty answer", (template, case)
            else:
                old = ("thought1",) if case == "reasoning of an earlier turn" else ()
                assert outcome.left_out in ((), old), (template, case)


def test_a_tokenizer_made_here(byte_tokenizer: Path) -> None:
    found = walk(byte_tokenizer)
    assert set(found) == set(TEMPLATES)
    _require_nothing_lost(found)
    for case in ("a call, its result", "calls in parallel", "text beside a call", "tools"):
        assert all(found[name][case].result == "equal" for name in ("chatml", "qwen2.5", "qwen3"))
    for case in ("reasoning", "reasoning before a call"):
        assert found["qwen3"][case].result == "equal"
    assert all(found[name]["question, answer"].result == "equal" for name in found)


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_the_document_is_current(name: str) -> None:
    """`make templates` writes it anew."""
    folder = asset_tokenizer(name)
    found = walk(folder)
    _require_nothing_lost(found)
    assert section(folder, found) in DOCUMENT.read_text(encoding="utf-8")


TEXTS = st.sampled_from(
    ["a", "", " b ", "\n\nc\n", "<think>\nx\n</think>\n\ny", "<think>\n\n</think>\n\nz", "</think>", "é", 'say "no"']
)
THOUGHTS = st.sampled_from([None, "", "because", "\nlines\n\n", "  "])
CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"], "y": None}}}
ANSWERS = st.builds(
    lambda text, thought, calls: assistant(
        text,
        **({} if thought is None else {"reasoning_content": thought}),
        **({"tool_calls": [CALL] * calls} if calls else {}),
    ),
    TEXTS, THOUGHTS, st.sampled_from([0, 0, 1, 2]),
)  # fmt: skip
OTHERS = st.builds(
    lambda role, text: {"role": role, "content": text}, st.sampled_from(["user", "tool", "system"]), TEXTS
)
TOOLS = st.sampled_from([None, [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]])


@pytest.fixture(scope="module")
def families() -> dict[str, Any]:
    """Built-in template → the tokenizer of the family, of those that are at hand."""
    folders = {path.name: path for path in asset_tokenizers()}
    found = {
        name: auto_tokenizer(str(folders[of]), trust_remote_code=False)
        for name, of in FAMILIES.items()
        if of in folders
    }
    return found or pytest.skip("no real tokenizer with a template: set JLLM_ASSETS")


@settings(max_examples=150, deadline=None)
@given(
    first=st.sampled_from([[user("q")], [{"role": "system", "content": " s "}, user(" q ")]]),
    more=st.lists(st.one_of(ANSWERS, OTHERS), max_size=7),
    tools=TOOLS,
)
def test_built_in_templates_are_those_of_their_families(
    families: dict[str, Any], first: list[dict[str, Any]], more: list[dict[str, Any]], tools: list[Any] | None
) -> None:
    """Whatever the conversation, a built-in template shows what the published one shows, or refuses it."""
    messages = [*first, *more]
    for name, tokenizer in families.items():
        source = tokenizer.chat_template
        given_here = shown(tokenizer, TEMPLATES[name], messages, tools)
        published = shown(tokenizer, source, messages, tools)
        assert given_here in (None, published)
        if name == "qwen3":
            assert given_here == published
        plain = not tools and all(len(each) == 2 and each["role"] != "tool" for each in messages)
        if plain and published is not None and not any(each["role"] == "system" for each in more):
            assert given_here == published


def test_cases_have_all_that_is_asked_for() -> None:
    given_fields = {key for record in CASES.values() for message in record["messages"] for key in message}
    assert {"tool_calls", "reasoning_content"} <= given_fields
