"""A broken file of a tokenizer's folder is named, in one line, and nothing is left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jllm.data.tokenizer.broken_files import broken_file
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError
from tests.data.raw2ids_runs import raw2ids, write_jsonl
from tests.data.tokenizers_for_tests import make_byte_tokenizer


def _without_model(path: Path) -> None:
    value = json.loads(path.read_text())
    del value["model"]
    path.write_text(json.dumps(value))


BREAKS: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_text(""),
    "list": lambda path: path.write_text("[]"),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "deep": lambda path: path.write_text("[" * 100_000),
}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("how", BREAKS)
def test_the_file_is_named(tmp_path: Path, name: str, how: str) -> None:
    folder = make_byte_tokenizer(tmp_path / "tokenizer")
    if not (folder / name).exists():
        (folder / name).write_text('{"pad_token": "<|endoftext|>"}')
    assert broken_file(folder) is None
    BREAKS[how](folder / name)
    reason = broken_file(folder)
    assert reason is not None
    assert reason.startswith(f"{folder / name}: ")
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value)) < 900


def test_what_tokenizers_refuses_is_said(tmp_path: Path) -> None:
    folder = make_byte_tokenizer(tmp_path / "tokenizer")
    _without_model(folder / "tokenizer.json")
    assert "Model missing" in str(broken_file(folder))


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_templates_are_files_of_a_tokenizer_too(tmp_path: Path, name: str) -> None:
    folder = make_byte_tokenizer(tmp_path / "tokenizer")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"\xff")
    assert broken_file(folder) == f"{folder / name}: no UTF-8 at byte 0"
    source = write_jsonl(tmp_path / "some.jsonl", ["a"])
    words = ["-i", source, "-o", tmp_path / "out", "-t", "pretrain", "--tokenizer", folder]
    refused = raw2ids(*words, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert name in refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    folder = make_byte_tokenizer(tmp_path / "tokenizer")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    assert "a link to a file that is not there" in str(broken_file(folder))
