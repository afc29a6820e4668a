"""The commands around models: quick help, and mistakes in one line before anything large is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from jllm.cli import main
from jllm.commands.extend_tokenizer import lines_of
from tests.fixtures import tiny_llama

HEAVY = ("torch", "transformers", "numpy", "peft", "deepspeed")


@pytest.mark.parametrize(
    "words",
    [
        ["merge"],
        ["adapter"],
        ["adapter", "info"],
        ["adapter", "to_gguf"],
        ["adapter", "control_to_lora"],
        ["cat2hf"],
        ["extend_tokenizer"],
    ],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    script = f"import sys; from jllm.cli import main\ntry: main({[*words, '-h']!r})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage:")
    assert not set(HEAVY) & set(done.stdout.splitlines()[-1].split())


def test_a_byte_order_mark_and_windows_lines_are_no_part_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_bytes("\ufeff<one>\r\n\r\n<two>\r\n".encode())
    assert lines_of(tmp_path / "tokens.txt") == ["<one>", "<two>"]


def test_a_group_without_a_command_shows_its_help() -> None:
    done = CliRunner().invoke(main, ["adapter"])
    assert done.exit_code == 0
    assert done.output == CliRunner().invoke(main, ["adapter", "--help"]).output
    assert done.stdout.startswith("Usage: ")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, an adapter that is none, a folder with something in it, and one without anything."""
    tiny_llama(tmp_path / "model", tied=True)
    for name in ("adapter", "full", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LOHA"}))
    (tmp_path / "full/x").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge -m nowhere --lora adapter -o new", "--model nowhere: does not exist"),
        ("merge -m empty --lora adapter -o new", "--model empty: has no config.json"),
        ("merge -m model --lora empty -o new", "--lora empty: has no adapter_config.json"),
        ("merge -m model --lora adapter -o full", "--output full: is not empty"),
        (
            "merge -m model --lora adapter -o model/config.json",
            "--output model/config.json: is there already, and is no folder",
        ),
        ("merge -m model --lora adapter -o link", "--output link: is there already, and is no folder"),
        ("merge -m model --lora adapter -o new --scale 0", "--scale 0: adds nothing"),
        ("merge -m model --lora adapter -o new --scale nan", "--scale"),
        ("merge -m model --lora adapter -o new", "an adapter of type 'LOHA'"),
        ("adapter info nowhere", "nowhere: does not exist"),
        ("adapter info adapter", "an adapter of type 'LOHA'; LORA or CONTROL is what this takes"),
        ("adapter info adapter -o page.txt", 'must end in ".html"'),
        ("adapter to_gguf adapter -m model -o x.bin", 'must end in ".gguf"'),
        ("adapter to_gguf adapter -m empty -o x.gguf", "has no config.json"),
        ("adapter control_to_lora adapter -m model -o full", "--output full: is not empty"),
        (
            "adapter control_to_lora adapter -m model -o new --control_class 2",
            "'2' is not one of '+1', '-1'.",
        ),
        ("adapter control_to_lora adapter -m model -o new --control_class -1", "an adapter of type 'LOHA'"),
        ("adapter infos adapter", 'no command "infos"; commands: '),
        ("cat2hf -C nowhere -H new", "--checkpoint nowhere: no such folder"),
        ("cat2hf -C empty -H full", "--hf full: is not empty"),
        ("cat2hf -C empty -H new", "--checkpoint empty: no complete checkpoint there"),
        ("extend_tokenizer -m model -o new", "nothing is to be added"),
        ("extend_tokenizer -m empty -o new --add a", "--model empty: has no config.json"),
        ("extend_tokenizer -m model -o new --add a", "has no tokenizer that transformers loads"),
        ("extend_tokenizer -m model -o new --add_file nowhere.txt", "nowhere.txt: No such file or directory"),
        ("extend_tokenizer -m model -o new --add a --pad_to_multiple_of 0", "--pad_to_multiple_of"),
    ],
)
def test_mistakes(folder: Path, line: str, message: str) -> None:
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 2, done.output
    assert message in done.output
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (folder / "new").exists()
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    "line",
    [
        "adapter info adapter",
        "cat2hf -C full -H new",
        "convert -m model -o new",
        "extend_tokenizer -m model -o new --add a",
    ],
)
def test_an_installation_for_data_alone(folder: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = CliRunner().invoke(main, line.split())
    assert done.exit_code == 2, done.output
    assert f"jllm {line.partition(' -')[0].removesuffix(' adapter')} needs torch" in done.stderr
    assert "pip install 'jllm[train]'" in done.stderr
    assert not (folder / "new").exists()
