"""Segments: nothing is cut but at control tokens."""

import os
import re

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from tests.data.chats import PLAIN, Chat, assistant, user

EXAMPLES = 25 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


texts = st.lists(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(["<think>", "<|im_end|>", "\n", " ", "a", "</think>"])),
    min_size=1,
    max_size=40,
).map("".join)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), marked=st.booleans())
def test_any_conversation_is_whole_text_tokenized_once(
    turns: list[tuple[str, str]], marked: bool, facts: TokenizerFacts, engine: CheckedEngine
) -> None:
    """Where no control token stands in the data, ids are those of the rendered text; always, trained is the answers."""
    chat = Chat(facts, engine, TEMPLATES["chatml"] if marked else PLAIN)
    messages = [message for asked, said in turns for message in (user(asked), assistant(said))]
    ids, labels, bad = chat.encode([{"messages": messages}])
    whole = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    if bad:
        assert not any(said.strip() for _, said in turns)
        return
    controls = re.findall("|".join(re.escape(token["content"]) for token in facts.added), "".join(sum(turns, ())))
    if not controls:
        assert ids[0] == chat.reference.encode(whole, add_special_tokens=False).ids
    answers = "".join(said + "<|im_end|>" for _, said in turns)
    decoded = chat.decode(labels[0])
    if re.sub(r"\s", "", whole).isascii():
        assert re.sub(r"\s", "", decoded) in (
            re.sub(r"\s", "", answers),
            re.sub(r"\s", "", "".join(said + "<|im_end|>" for _, said in turns if said.strip())),
        )
