"""What a tokenizer is: what AutoTokenizer says, and one line where it says nothing."""

from pathlib import Path

import pytest
import transformers

from jllm.data.tokenizer import facts as module
from jllm.data.tokenizer.facts import PROBES, TokenizerLoading, base_name, load_tokenizer
from jllm.errors import UserError
from tests.data.tokenizers_for_tests import ADDED, SPECIAL, sentencepiece_like


def test_facts_are_those_of_autotokenizer(byte_tokenizer: Path) -> None:
    facts = load_tokenizer(str(byte_tokenizer))
    tokenizer = transformers.AutoTokenizer.from_pretrained(byte_tokenizer)
    assert facts.vocab_size == len(tokenizer)
    assert (facts.eos_id, facts.pad_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (facts.prefix, facts.suffix) == ((), ())
    assert [token["content"] for token in facts.added] == [*SPECIAL, *ADDED]
    assert facts.special_ids == frozenset(tokenizer.convert_tokens_to_ids(SPECIAL))
    assert facts.special_tokens["eos_token"] == "<|im_end|>"
    assert set(PROBES) < set(facts.probes)
    for text, ids, special_ids in zip(facts.probes, facts.probe_ids, facts.probe_special_ids, strict=True):
        assert list(ids) == tokenizer(text, split_special_tokens=True).input_ids
        assert list(special_ids) == tokenizer(text).input_ids
    assert facts.for_manifest.sha256 == facts.sha256


def test_what_a_tokenizer_puts_around_a_text(tmp_path: Path) -> None:
    facts = load_tokenizer(str(sentencepiece_like(tmp_path / "llama", "first")))
    assert [token["content"] for token in facts.added if token["id"] in facts.prefix] == ["<s>"]
    assert facts.suffix == ()
    assert facts.name == "llama"
    assert base_name("somebody/Some-Model") == "Some-Model"
    assert base_name(f"{tmp_path}/llama/") == "llama"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere"])
def test_a_folder_that_is_not_there_starts_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.subprocess, "Popen", None)
    with pytest.raises(UserError, match="no such folder"):
        TokenizerLoading(name)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "odd.model").write_bytes(b"")
    loading = TokenizerLoading(str(tmp_path))
    assert loading.known is None
    with pytest.raises(UserError, match=r"cannot be loaded; give a folder .*; odd\.model alone may need: pip install"):
        loading.result()


def test_a_cancelled_child_ends(tmp_path: Path) -> None:
    loading = TokenizerLoading(str(tmp_path))
    loading.cancel()
    assert loading._child.poll() is not None
