"""Whether a command of a page would be accepted, without running it."""

import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import click

from jllm.cli import COMMANDS
from jllm.errors import UserError
from jllm.options import Group
from tests.pages.blocks import ROOT

OF_OTHERS = ("spark-submit", "deepspeed", "pip install")
"""Commands of other projects whose options are looked up in their `--help`."""


def split(command: str) -> list[str]:
    """The words of a command, without the variables before it and the comment behind it."""
    words = shlex.split(command, comments=True)
    while words and re.match(r"\w+=", words[0]):
        del words[0]
    return words


@functools.cache
def _command_of_script(path: Path) -> click.Command | None:
    """The click command of a script of ours; None where it has another parser."""
    spec = importlib.util.spec_from_file_location(f"page_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, "main", None)
    return found if isinstance(found, click.Command) else None


PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
"""With what is installed beside this Python."""


def is_here(name: str) -> bool:
    """Whether a command can be called on this machine."""
    needed = [name, *(["java"] if name == "spark-submit" else [])]
    return all(shutil.which(program, path=PATH) is not None for program in needed)


@functools.cache
def help_of(*words: str) -> str:
    """What a command says about itself."""
    done = subprocess.run(
        [*words, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": PATH},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout + done.stderr


def is_theirs(flag: str, *command: str) -> bool:
    """Whether another project's command has a flag; where the command is not here, nobody can tell."""
    if not is_here(command[0]):
        return True
    return re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", help_of(*command)) is not None


def command_of(words: Sequence[str]) -> tuple[click.Command, list[str]] | None:
    """The command of ours that these words call, and its arguments; None where they call none.

    Raises:
        AssertionError: there is no such command, module or script.
    """
    if words[0] == "jllm" and len(words) > 1 and not words[1].startswith("-"):
        assert words[1] in COMMANDS, f"jllm has no command {words[1]}"
        module, _, attribute = COMMANDS[words[1]][0].partition(":")
        return _within(getattr(importlib.import_module(module), attribute), list(words[2:]))
    flag = {"python": "-m", "deepspeed": "--module"}.get(words[0])
    if flag in words[:-1]:
        at = words.index(flag) + 1
        if words[at] == "jllm":
            return command_of(words[at:])
        assert importlib.util.find_spec(words[at]) is not None, f"no module {words[at]}"
        return importlib.import_module(words[at]).main, list(words[at + 1 :])
    for at, word in enumerate(words[1:], 1):
        if word.endswith(".py") and words[0] in ("python", "spark-submit", ".venv/bin/python"):
            assert (ROOT / word).is_file(), f"no script {word}"
            script = _command_of_script(ROOT / word)
            return (script, list(words[at + 1 :])) if script is not None else None
    return None


def _within(command: click.Command, words: list[str]) -> tuple[click.Command, list[str]]:
    """The command of a group that words call, or the group itself where they name none of it."""
    if isinstance(command, Group) and words and not words[0].startswith("-"):
        assert words[0] in command.lazy, f"{command.name} has no command {words[0]}"
        module, _, attribute = command.lazy[words[0]][0].partition(":")
        return getattr(importlib.import_module(module), attribute), words[1:]
    return command, words


def flags_of(command: click.Command) -> set[str]:
    """All flags of a command of ours."""
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"-h", "--help"}


def used_flags(words: Iterable[str]) -> list[str]:
    """The words that are flags, without their values."""
    return [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def check_known(command: str) -> None:
    """See to it that a command and its flags exist; values may be left out, or stand for others.

    Raises:
        AssertionError: one does not.
    """
    words = split(command)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        unknown = {word for word in words[1:] if "=" not in word} - targets
        assert not unknown, f"make has no {sorted(unknown)}: {command}"
        return
    found = command_of(words)
    own: list[str] = []
    if found is not None:
        known, own = flags_of(found[0]), found[1]
    elif words[0] == "python":
        known, own = set(re.findall(r"--?[A-Za-z][\w-]*", help_of(sys.executable, words[1]))), list(words[2:])
    unknown = sorted(set(used_flags(own)) - known) if own else []
    assert not unknown, f"{unknown} in: {command}"
    for name in OF_OTHERS:
        if words[: len(name.split())] == name.split():
            theirs = words[: len(words) - len(own)]
            program = [sys.executable, "-m", "pip", "install"] if name.startswith("pip") else [name]
            unknown = [flag for flag in used_flags(theirs) if not is_theirs(flag, *program)]
            assert not unknown, f"{unknown} in: {command}"


def is_complete(command: str) -> bool:
    """Whether a command of ours could be run as it stands: nothing that it needs is left out."""
    if "..." in command or {"-h", "--help"} & set(split(command)):
        return False
    try:
        check_accepted(command)
    except AssertionError:
        return False
    return True


def check_accepted(command: str) -> None:
    """See to it that a whole command would be accepted: its options, their values, and what these say together.

    Raises:
        AssertionError: it would not.
    """
    check_known(command)
    words = split(command)
    if words[:2] == ["pip", "install"]:
        extras = set(re.findall(r'"(\w+)": [A-Z]+', (ROOT / "setup.py").read_text(encoding="utf-8")))
        named = {name for word in words for part in re.findall(r"^\.?\w*\[(.+)\]$", word) for name in part.split(",")}
        assert named <= extras, f"setup.py has no {sorted(named - extras)}: {command}"
    found = command_of(words)
    if found is None:
        return
    assert not isinstance(found[0], click.Group), f"a group, not a command of it: {command}"
    try:
        context = found[0].make_context(words[0], list(found[1]))
        inspect.getclosurevars(found[0].callback).nonlocals["config_type"](**context.params)
    except (click.ClickException, UserError) as error:
        raise AssertionError(f"{error}: {command}") from None
