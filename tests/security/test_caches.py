"""Hostile caches: whatever lies in one, a command's output is that of a run without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jllm.data.tokenizer import cache, facts
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.guards import caches
from tests.data.tokenizers_for_tests import make_byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


def loaded(folder: Path) -> TokenizerFacts:
    """As a new process has it."""
    facts._loaded.clear()
    return load_tokenizer(str(folder))


def test_an_entry_that_was_changed_is_made_anew(
    byte_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = loaded(byte_tokenizer)
    [entry] = (tmp_path / "jllm/tokenizers").iterdir()
    whole = entry.read_bytes()
    edited = whole.replace(f'"eos_id":{first.eos_id}'.encode(), b'"eos_id":1')
    assert edited != whole
    for damage in (edited, b""):
        entry.write_bytes(damage)
        assert loaded(byte_tokenizer) == first
        assert entry.read_bytes() == whole
    kept: dict[str, Any] = json.loads(caches.read(entry) or b"")
    assert facts._known_facts(kept) == first
    caches.write(entry, json.dumps({**kept, "colour": "red"}).encode())  # as another version may have left it
    assert loaded(byte_tokenizer) == first
    assert entry.read_bytes() == whole
    for damage in (whole[:200], b"[]", b"null", b"\xff\xfe", b"[" * 200_000):
        entry.write_bytes(damage)
        assert cache.read(entry) is None
    for content in (b"[" * 200_000, b"[]", b"5", b"\xff", b""):  # with the right checksum
        caches.write(entry, content)
        assert cache.read(entry) is None
    for wrong in (
        {"colour": "red"},
        {"probes": None},
        {"eos_id": "5"},
        {"backend": ["a"]},
        {"probe_ids": [["a"]]},
        {"added": [5]},
        {"vocab_size": -1},
        {"prefix": [1.5]},
        {"name": None},
    ):
        assert facts._known_facts({**kept, **wrong}) is None
    for key in ("eos_id", "probes", "name", "backend"):
        assert facts._known_facts({name: value for name, value in kept.items() if name != key}) is None
    assert not capsys.readouterr().err


@pytest.mark.parametrize("given", ["", "here"])
def test_no_cache_is_made_in_the_working_folder(byte_tokenizer: Path, tmp_path: Path, given: str) -> None:
    """Nor do libraries take an empty variable for one: HF_HOME, TORCH_EXTENSIONS_DIR."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir(), work.mkdir()
    places = {"XDG_CACHE_HOME": given, "TORCH_EXTENSIONS_DIR": "", "HF_HOME": ""}
    command = [sys.executable, "-m", "jllm.raw2ids", "-t", "pretrain", "-i", str(tmp_path / "a.jsonl"), "--tokenizer",
               str(byte_tokenizer), "-o", str(tmp_path / "out"), "--cores", "1"]  # fmt: skip
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), **places}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(work.iterdir()) == []
    assert len(list((home / ".cache/jllm/tokenizers").iterdir())) == 1


def test_compiled_operators_lie_where_caches_do(tmp_path: Path) -> None:
    """The folder is chosen, and left, before anything is compiled."""
    code = (
        "import os, sys; sys.argv[0] = 'jllm'; import jllm; from jllm.train.distributed import operators;"
        " import deepspeed.accelerator as a; a.get_accelerator = lambda: type('A', (), {'create_op_builder':"
        " lambda self, name: None})(); operators.compile_for_cpu(); print(os.environ['TORCH_EXTENSIONS_DIR'])"
    )
    places = {"XDG_CACHE_HOME": "", "TORCH_EXTENSIONS_DIR": "", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, **places}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[-1]).is_relative_to(tmp_path / ".cache/jllm/torch_extensions")
