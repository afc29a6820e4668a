"""A tokenizer is loaded once for each state of its folder; what is kept never outlives a change of it."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

from jllm.data.tokenizer import cache, facts
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer


@pytest.fixture
def folder(byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer's folder, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(byte_tokenizer, tmp_path / "tokenizer")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], tuple[TokenizerFacts, bool]]:
    """Load as a new process would: the facts, and whether AutoTokenizer was asked."""
    asked = []
    plain = subprocess.Popen

    def counted(*arguments: object, **more: object) -> object:
        asked.append(arguments)
        return plain(*arguments, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(facts.subprocess, "Popen", counted)

    def loaded(folder: Path) -> tuple[TokenizerFacts, bool]:
        facts._loaded.clear()
        asked.clear()
        return load_tokenizer(str(folder)), bool(asked)

    return loaded


def test_loaded_once(folder: Path, load: Callable[[Path], tuple[TokenizerFacts, bool]]) -> None:
    first, asked = load(folder)
    assert asked
    again, asked = load(folder)
    assert not asked
    assert again == first
    moved = shutil.copytree(folder, folder.with_name("other"))
    elsewhere, asked = load(moved)
    assert not asked
    assert (elsewhere.name, elsewhere.path) == ("other", str(moved))


def test_any_change_is_seen(folder: Path, load: Callable[[Path], tuple[TokenizerFacts, bool]]) -> None:
    first, _ = load(folder)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "eos_token": "<|endoftext|>"}))
    changed, asked = load(folder)
    assert asked
    assert changed.eos_id != first.eos_id
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    changed, asked = load(folder)
    assert asked
    assert changed.chat_template == "{{ messages }}"


def test_named_templates_are_those_of_transformers_and_their_changes_are_seen(
    folder: Path, load: Callable[[Path], tuple[TokenizerFacts, bool]]
) -> None:
    (folder / "chat_template.jinja").write_text("{{ 0 }}")
    first, _ = load(folder)
    assert (first.chat_template, first.chat_templates) == ("{{ 0 }}", {})
    (folder / "additional_chat_templates").mkdir()
    for number, name in enumerate(("tool_use", "rag", "tool_use"), 1):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"{{{{ {number} }}}}")
        changed, asked = load(folder)
        assert asked
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        assert changed.chat_templates == tokenizer.chat_template
        assert changed.chat_template == tokenizer.get_chat_template() == "{{ 0 }}"
        assert changed.chat_templates["tool_use"] == tokenizer.get_chat_template(tools=[{}])
    (folder / "chat_template.jinja").unlink()
    changed, _ = load(folder)
    assert changed.chat_template is None
    assert set(changed.chat_templates) == {"tool_use", "rag"}
    config = folder / "tokenizer_config.json"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": named}))
    (folder / "additional_chat_templates" / "tool_use.jinja").unlink()
    (folder / "additional_chat_templates" / "rag.jinja").unlink()
    changed, _ = load(folder)
    assert (changed.chat_template, changed.chat_templates) == ("a", {"default": "a", "tool_use": "b"})


def test_a_broken_entry_is_loaded_anew(folder: Path, load: Callable[[Path], tuple[TokenizerFacts, bool]]) -> None:
    first, _ = load(folder)
    [entry] = (folder.parent / "cache/jllm/tokenizers").glob("*.jsonl")
    entry.write_bytes(entry.read_bytes()[:100])
    again, asked = load(folder)
    assert asked
    assert again == first


def test_own_code_is_never_kept(folder: Path) -> None:
    assert cache.entry_of(folder, ()) is not None
    (folder / "tokenization_own.py").touch()
    assert cache.entry_of(folder, ()) is None
