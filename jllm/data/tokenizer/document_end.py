"""The token that ends a document, as in pretraining.

It is the tokenizer's `eos_token`, but for chat tokenizers whose `eos_token` ends a turn: their vocabulary usually still
has the token that the base model was trained to see between documents, and a document that ended with the end of a
turn would teach the model to hand over where a text is over.

Guarantees: another token than `eos_token` is taken only where that ends a turn, by its name or by the tokenizer's own
chat template, and only one that is special in this vocabulary and does not end turns itself.
"""

import re

from jllm.data.tokenizer.facts import TokenizerFacts

SEPARATORS = (
    "<|endoftext|>",  # GPT-2 and all that follow it: Qwen, Phi, Falcon, OLMo, SmolLM, gpt-oss
    "<|end_of_text|>",  # Llama 3 and 4, Granite, SmolLM3
    "<eos>",  # Gemma
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
    "<EOS_TOKEN>",  # Command
    "[EOS]",  # Kimi
    "</s>",  # Llama 2, Mistral, and what was made of them
)
"""What stands between documents in pretraining, by families; the first one that a vocabulary has."""
ENDS_OF_TURNS = frozenset(
    (
        "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<turn|>", "<|end|>",
        "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_turn|>", "<|endofturn|>", "[|endofturn|]",
        "<|role_end|>", "<|message_end|>", "<end_of_utterance>",
    )
)  # fmt: skip
"""Tokens that end a turn by their name, whatever else is known of the tokenizer."""


def document_end(facts: TokenizerFacts) -> int | None:
    """The id of the token that ends documents; None for a tokenizer without an end-of-text token."""
    eos = facts.special_tokens.get("eos_token")
    if facts.eos_id is None or eos is None or eos in SEPARATORS or not _ends_turns(eos, facts):
        return facts.eos_id
    special = {token["content"]: int(token["id"]) for token in facts.added if token["special"]}
    return next((special[text] for text in SEPARATORS if text in special), facts.eos_id)


def _ends_turns(eos: str, facts: TokenizerFacts) -> bool:
    """Whether the tokenizer's `eos_token` ends a turn: its name says so, or its chat template writes it."""
    if eos in ENDS_OF_TURNS:
        return True
    templates = [facts.chat_template or "", *facts.chat_templates.values()]
    return any(eos in template or re.search(r"\beos_token\b", template) for template in templates)
