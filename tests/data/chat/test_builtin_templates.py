"""Built-in templates against transformers."""

from pathlib import Path

import pytest

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import CONVERSATIONS, Chat


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_built_in_templates_have_the_mask_of_transformers(
    name: str, byte_tokenizer: Path, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_tokenizer)
    chat = Chat(facts, engine, TEMPLATES[name])
    ids, labels, bad = chat.encode([{"messages": messages} for messages in CONVERSATIONS])
    assert not bad
    template = TEMPLATES[name].replace("strftime_now('%d %b %Y')", "'31 Jan 2026'")
    for messages, given_ids, given_labels in zip(CONVERSATIONS, ids, labels, strict=True):
        wanted = tokenizer.apply_chat_template(
            messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        assert given_ids == wanted["input_ids"]
        assert [label != IGNORE_INDEX for label in given_labels] == [bool(m) for m in wanted["assistant_masks"]]
