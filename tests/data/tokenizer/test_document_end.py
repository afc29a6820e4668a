"""What ends documents: end-of-text, also where the tokenizer's own end is that of a turn."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.tokenizer.document_end import ENDS_OF_TURNS, SEPARATORS, document_end
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from tests.data.tokenizers_for_tests import asset_tokenizer, make_byte_tokenizer


def facts_with(base: TokenizerFacts, eos: str | None, tokens: list[tuple[str, bool]], template: str | None = None,
               templates: dict[str, str] | None = None) -> TokenizerFacts:  # fmt: skip
    """Facts about a tokenizer with these added tokens, each special or not, which have the ids 0, 1, ..."""
    added = tuple({"id": index, "content": text, "special": special} for index, (text, special) in enumerate(tokens))
    index = next((token["id"] for token in added if token["content"] == eos), None)
    specials = {} if eos is None else {"eos_token": eos}
    return dataclasses.replace(
        base, added=added, eos_id=index, special_tokens=specials, chat_template=template, chat_templates=templates or {}
    )


@pytest.fixture(scope="module")
def base(byte_tokenizer: Path) -> TokenizerFacts:
    return load_tokenizer(str(byte_tokenizer))


@pytest.mark.parametrize(
    ("eos", "template", "others", "wanted"),
    [
        ("<|im_end|>", None, ["<|endoftext|>"], "<|endoftext|>"),
        ("<|eot_id|>", "x", ["<|end_of_text|>"], "<|end_of_text|>"),
        ("<end_of_turn>", "x", ["<eos>", "</s>"], "<eos>"),
        ("<|return|>", None, ["<|startoftext|>", "<|endoftext|>"], "<|endoftext|>"),
        ("<|im_end|>", "{{ eos_token }}", ["<s>", "</s>"], "</s>"),
        ("<own>", "{{ '<own>' }}", ["<|endoftext|>"], "<|endoftext|>"),
        ("<own>", "{{ x + eos_token }}", ["<|endoftext|>"], "<|endoftext|>"),
        ("<own>", None, ["<|endoftext|>"], "<own>"),
        ("<own>", "{{ 'no end' }}", ["<|endoftext|>"], "<own>"),
        ("</s>", "{{ eos_token }}", ["<|endoftext|>"], "</s>"),
        ("<|im_end|>", "{{ eos_token }}", ["<s>"], "<|im_end|>"),
    ],
)
def test_the_separator_of_the_family(
    base: TokenizerFacts, eos: str, template: str | None, others: list[str], wanted: str
) -> None:
    tokens = [(text, True) for text in (*others, eos)]
    for several in (False, True):
        templates = {"tool_use": template} if several and template else {}
        facts = facts_with(base, eos, tokens, None if several else template, templates)
        end = document_end(facts)
        assert end is not None
        assert tokens[end][0] == wanted
    ordinary = facts_with(base, eos, [*((text, False) for text in others), (eos, True)], template)
    assert document_end(ordinary) == len(others)  # what is no special token separates nothing


@given(
    eos=st.sampled_from([*SEPARATORS, *sorted(ENDS_OF_TURNS), "<own>", None]),
    tokens=st.lists(st.tuples(st.sampled_from([*SEPARATORS, "<s>", "<pad>"]), st.booleans()), max_size=6),
    template=st.sampled_from([None, "", "{{ eos_token }}"]),
)
def test_it_is_the_eos_token_or_a_special_separator(
    base: TokenizerFacts, eos: str | None, tokens: list[tuple[str, bool]], template: str | None
) -> None:
    own = [] if eos is None else [(eos, True)]
    named = [*own, *((text, special) for text, special in dict(tokens).items() if text != eos)]
    end = document_end(facts_with(base, eos, named, template))
    if eos is None:
        assert end is None
        return
    assert end is not None
    text, special = named[end]
    assert special
    assert text == eos or (eos not in SEPARATORS and text in SEPARATORS)
    if eos in ENDS_OF_TURNS and any(special and text in SEPARATORS for text, special in named):
        assert text in SEPARATORS


def test_real_chat_tokenizers() -> None:
    for name, end in (("qwen3", "<|endoftext|>"), ("llama2", "</s>")):
        facts = load_tokenizer(str(asset_tokenizer(name)))
        assert {token["id"]: token["content"] for token in facts.added}[document_end(facts)] == end


def test_no_eos_token(tmp_path: Path) -> None:
    assert document_end(load_tokenizer(str(make_byte_tokenizer(tmp_path, eos_token=None)))) is None
