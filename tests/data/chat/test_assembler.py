"""Rendered conversations to ids: those of the whole text, whatever the tokenizer puts in front."""

from pathlib import Path
from typing import Any

import pytest

from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from tests.data.tokenizers_for_tests import sentencepiece_like


@pytest.mark.parametrize("choice", ["auto", "hf"])
@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_conversations_of_sentencepiece_like_tokenizers(tmp_path: Path, scheme: str, choice: str) -> None:
    from tests.data.chats import CONVERSATIONS, Chat

    facts = load_tokenizer(str(sentencepiece_like(tmp_path / "tokenizer", scheme)))
    template = "{%- for m in messages %}{{- m.role + ': ' + m.content + eos_token + '\\n' }}{%- endfor %}"
    chat = Chat(facts, open_engine(facts, choice, inert=True), template)
    for messages in CONVERSATIONS:
        ids, labels, bad = chat.encode([{"messages": messages}])
        assert not bad
        whole = "".join(f"{m['role']}: {m['content']}</s>\n" for m in messages)
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
        trained = "".join(text_of(chat, labels[0]).split())
        answers = "".join(m["content"] + "</s>" for m in messages if m["role"] == "assistant")
        assert trained == "".join(answers.split())


def text_of(chat: Any, labels: list[int]) -> str:
    """The trained tokens as text, put together from the vocabulary."""
    data = b""
    for index in labels:
        token = chat.reference.id_to_token(index) if index >= 0 else ""
        is_byte = len(token) == 6 and token.startswith("<0x")
        data += bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()
    return data.decode()
