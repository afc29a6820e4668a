"""Tokenizers are compared by what they do: a copy saved anew is the same, a token with another id is named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from jllm.data.dataset.manifest import DataSet, Manifest, Tokenizer
from jllm.data.tokenizer.comparison import difference, vocabulary_of
from jllm.data.tokenizer.facts import load_tokenizer
from tests.data.tokenizers_for_tests import asset_tokenizers, make_byte_tokenizer, make_slow_folder, sentencepiece_like


def made_with(folder: Path, **options: str) -> DataSet:
    """A data set without rows that says it was made with the tokenizer in `folder`."""
    tokenizer = load_tokenizer(str(folder)).for_manifest
    manifest = Manifest(command="raw2ids", options=options, files=(), tokenizer=tokenizer)
    return DataSet(folder=Path("set"), manifest=manifest)


def changed(source: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a tokenizer whose tokenizer.json is another one."""
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    change(value)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


@pytest.mark.parametrize("kind", ["bytes", "llama", "slow", *(path.name for path in asset_tokenizers())])
def test_a_copy_saved_anew_is_the_same(tmp_path: Path, kind: str) -> None:
    makers: dict[str, Callable[[Path], Path]] = {
        "bytes": make_byte_tokenizer,
        "llama": lambda folder: sentencepiece_like(folder, "first"),
        "slow": make_slow_folder,
    }
    known = {path.name: path for path in asset_tokenizers()}
    source = makers[kind](tmp_path / "source") if kind in makers else known[kind]
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "again")
    assert difference(made_with(source), load_tokenizer(str(tmp_path / "again"))) is None


def test_other_bytes_are_the_same_tokenizer(tmp_path: Path, tokenizer: Path) -> None:
    """As another version of the library writes them."""
    copy = changed(tokenizer, tmp_path / "copy", lambda value: value.update(truncation=None, version="1.0"))
    other = dataclasses.replace(load_tokenizer(str(copy)), sha256="0" * 64)
    assert difference(made_with(tokenizer), other) is None


def swap(value: dict[str, Any]) -> None:
    """Two tokens of the vocabulary change places, which no probe need contain."""
    vocabulary = value["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.__getitem__)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def test_a_token_with_another_id_is_named(tmp_path: Path, tokenizer: Path) -> None:
    other = load_tokenizer(str(changed(tokenizer, tmp_path / "other", swap)))
    token = next(token for token, identity in vocabulary_of(load_tokenizer(str(tokenizer))).items() if identity == 40)
    # With the tokenizer that made the set at hand, and by what the manifest says alone.
    assert difference(made_with(tokenizer, tokenizer=str(tokenizer)), other) == (
        f"the token {token!r} has the id 40 there and 41"
    )
    assert "has the id 40 there and 41" in (difference(made_with(tokenizer), other) or "")


def test_added_tokens_are_named(tmp_path: Path, tokenizer: Path) -> None:
    import tokenizers

    more = make_byte_tokenizer(tmp_path / "more", more=[tokenizers.AddedToken("<tool>", special=True)])
    size = load_tokenizer(str(tokenizer)).vocab_size
    assert difference(made_with(tokenizer), load_tokenizer(str(more))) == (
        f"the token '<tool>' has no id there and {size}"
    )
    assert difference(made_with(more), load_tokenizer(str(tokenizer))) == (
        f"the token '<tool>' has the id {size} there and none"
    )


def test_another_tokenizer_of_the_same_tokens(tmp_path: Path, tokenizer: Path) -> None:
    """The vocabulary is equal, and texts become other ids: the first text is named."""
    prefixed = changed(
        tokenizer, tmp_path / "prefixed", lambda value: value["pre_tokenizer"].update(add_prefix_space=True)
    )
    said = difference(made_with(tokenizer, tokenizer=str(tokenizer)), load_tokenizer(str(prefixed)))
    assert said is not None
    assert said.startswith(("in the text ", "the text "))


def test_an_older_manifest_is_compared_by_bytes(tokenizer: Path) -> None:
    facts = load_tokenizer(str(tokenizer))
    old = Tokenizer(name="it", vocab_size=facts.vocab_size, sha256=facts.sha256)
    data_set = DataSet(folder=Path("set"), manifest=Manifest(command="x", options={}, files=(), tokenizer=old))
    assert difference(data_set, facts) is None
    said = difference(data_set, dataclasses.replace(facts, sha256="0" * 64))
    assert said is not None
    assert "only a hash of the tokenizer's bytes" in said
    assert "jllm manifest set --tokenizer" in said


def test_without_a_record_nothing_is_compared(tokenizer: Path) -> None:
    bare = DataSet(folder=Path("set"), manifest=Manifest(command="join", options={}, files=()))
    assert difference(bare, load_tokenizer(str(tokenizer))) is None
