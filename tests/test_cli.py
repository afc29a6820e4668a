"""What every command promises before it does anything: help, version, quick starts, one-line mistakes."""

import subprocess
import sys

import pytest

from jllm import __version__
from jllm.cli import COMMANDS

HEAVY = {"torch", "transformers", "pyarrow", "numpy", "deepspeed", "tokenizers", "fastokens"}
MODULES = (
    "jllm.raw2ids",
    "jllm.shuffle_datasets",
    "jllm.shuffle_partition",
    "jllm.repartition",
    "jllm.train_pipe",
)


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )


@pytest.mark.parametrize("module", MODULES)
def test_help_of_every_module_form_imports_nothing_heavy(module: str) -> None:
    script = (
        "import importlib, sys\n"
        f"command = importlib.import_module({module!r}).main\n"
        "try: command(['-h'])\n"
        "finally: print('LOADED', *sorted(set(sys.argv[1:]) & set(sys.modules)))\n"
    )
    result = run("-c", script, *sorted(HEAVY))
    assert result.returncode == 0, result.stderr
    assert "--help" in result.stdout
    assert result.stdout.splitlines()[-1].split() == ["LOADED"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_of_the_group_has_help(name: str, flag: str) -> None:
    result = run("-m", "jllm", name, flag)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Usage:")


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        (
            "train",
            [
                "Data",
                "Model",
                "Adapters",
                "Parallelism",
                "Steps",
                "Objective",
                "Preference pairs",
                "Optimizer",
                "Speed",
            ],
        ),
        ("raw2ids", ["Input and output", "Tokenizer", "Rows", "Documents, -t pretrain", "Conversations, -t ft"]),
    ],
)
def test_many_options_stand_in_groups(name: str, groups: list[str]) -> None:
    lines = run("-m", "jllm", name, "-h").stdout.splitlines()
    headings = [line[:-1] for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[: len(groups)] == groups
    assert not [
        line for line in lines if line.strip().startswith("-") and "--no_" in line.split("  ")[0].partition("/")[2]
    ]


def test_the_group_lists_its_commands_without_importing_them() -> None:
    result = run("-m", "jllm", "--help")
    assert result.returncode == 0
    for name, (_, line) in COMMANDS.items():
        assert name in result.stdout
        assert line in " ".join(result.stdout.split())


@pytest.mark.parametrize("arguments", [["jllm"], ["jllm", "raw2ids"], *([module] for module in MODULES)])
def test_version(arguments: list[str]) -> None:
    result = run("-m", *arguments, "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"jllm {__version__}"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["jllm", "shufle"], ["no command", '"shufle"', 'Did you mean "shuffle"?']),
        (["jllm.raw2ids", "--tokeniser", "x"], ["--tokeniser", "--tokenizer"]),
        (["jllm.shuffle_datasets"], ["--data"]),
        (["jllm.shuffle_datasets", "-d", "nowhere"], ["nowhere", "no such folder"]),
        (["jllm.repartition", "-d", "nowhere", "-n", "2"], ["nowhere", "no such folder"]),
        (["jllm.repartition", "-d", ".", "-n", "0"], ["--num_partition 0", "at least 1"]),
        (["jllm.train_pipe"], ["--model is missing"]),
        (["jllm.train_pipe", "--learning_rate", "fast"], ["--learning_rate", "'fast'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], expected: list[str]) -> None:
    result = run("-m", *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    for words in ["error: ", *expected]:
        assert words in lines[0]


def test_jllm_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from jllm.cli import main

    main([])
    assert "raw2ids" in capsys.readouterr().out
