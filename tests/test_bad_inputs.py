"""Bad and odd inputs, to every data command: exit code 0 or 2, one line that says why, nothing left behind, and the
same command on good input completes. How many are tried is up to JLLM_TEST_SIZE; all of them from 13 on."""

import contextlib
import io
import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from jllm import inspect, manifest, raw2ids, repartition, shuffle_datasets, shuffle_partition
from tests.bad_inputs import GOOD_WORDS, Case, all_cases, good
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.odd_files import bare_root

COMMANDS: dict[str, click.Command] = {
    "raw2ids": raw2ids.main,
    "shuffle_datasets": shuffle_datasets.main,
    "shuffle_partition": shuffle_partition.main,
    "repartition": repartition.main,
    "manifest": manifest.main,
    "inspect": inspect.main,
}
CASES = all_cases()[: 70 * int(os.environ.get("JLLM_TEST_SIZE", "1"))]


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_byte_tokenizer(tmp_path_factory.mktemp("tokenizer") / "bytes")


pytestmark = pytest.mark.filterwarnings(  # Python would print these with a traceback
    "error::pytest.PytestUnraisableExceptionWarning", "error::pytest.PytestUnhandledThreadExceptionWarning"
)
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")


def run(command: str, words: tuple[str, ...], folder: Path, tokenizer: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a command in this process; what it does not catch is raised."""
    line = [word.replace("{folder}", str(folder)) for word in words]
    if command == "raw2ids":
        line = ["--tokenizer", str(tokenizer), "--cores", "1", *line]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            COMMANDS[command].main(line)
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue(), err.getvalue()


def everything(folder: Path) -> set[str]:
    return {os.fsencode(path.relative_to(folder)).decode(errors="replace") for path in folder.rglob("*")}


def is_one_line(code: int, err: str) -> bool:
    lines = err.splitlines()
    mistakes = [line for line in lines if line.startswith("error: ")]
    return not mistakes if code == 0 else code == 2 and len(mistakes) == 1 and lines[-1] == mistakes[0]


@contextlib.contextmanager
def sandbox(path: Path) -> Iterator[Path]:
    """A folder with good input; writable again at the end, so that it can be removed."""
    good(path)
    try:
        yield path
    finally:
        _open_up(path)


def _open_up(path: Path) -> None:
    for parent, folders, files in os.walk(path):
        for name in (".", *folders, *files):
            if not os.path.islink(os.path.join(parent, name)):
                os.chmod(os.path.join(parent, name), 0o755)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.encode("unicode_escape").decode()[:60])
def test_bad_input_is_one_line(tmp_path: Path, byte_tokenizer: Path, case: Case) -> None:
    with sandbox(tmp_path / "x") as folder:
        case.make(folder)
        with bare_root() if case.bare else contextlib.nullcontext():
            before = everything(folder)
            code, out, err = run(case.command, case.words, folder, byte_tokenizer)
            assert is_one_line(code, err), (code, err)
            assert not CONTROL.search(out + err), out + err
            if code == 2:
                left = everything(folder)
                kept = {path for path in left if path.split("/")[0] == "out"} if case.keeps else set()
                assert left - kept == before
        _open_up(folder)
        for name in ("in", "chats", "sets", "out"):
            if (folder / name).is_dir() and not (folder / name).is_symlink():
                if name != "out" or case.command != "raw2ids" or "Is a directory" in err or "another folder" in err:
                    shutil.rmtree(folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "again", ignore_errors=True)
        good(folder / "again")
        for name in ("in", "chats", "sets"):
            (folder / "again" / name).rename(folder / name)
        words = GOOD_WORDS[case.command]
        code, out, err = run(
            case.command, (*words, "-C") if case.command == "raw2ids" else words, folder, byte_tokenizer
        )
        assert code == 0, err


@pytest.mark.parametrize("command", [name for name in GOOD_WORDS if name != "inspect"])
@pytest.mark.parametrize("size", [0, 100, 700, 3000])
def test_files_that_cannot_grow(tmp_path: Path, byte_tokenizer: Path, command: str, size: int) -> None:
    """As on a full disk: one line that names a file; with room again, the same command completes."""
    with sandbox(tmp_path / "x") as folder:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            code, _, err = run(command, GOOD_WORDS[command], folder, byte_tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert is_one_line(code, err), (code, err)
        if code:
            assert str(folder) in err
            assert "run the same command again" in err
        assert run(command, GOOD_WORDS[command], folder, byte_tokenizer)[0] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("command", [name for name in GOOD_WORDS if name != "inspect"])
def test_a_disk_that_is_full(small_disk: Path, byte_tokenizer: Path, command: str) -> None:
    with sandbox(small_disk / "x") as folder:
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        code, _, err = run(command, GOOD_WORDS[command], folder, byte_tokenizer)
        assert code == 2
        assert is_one_line(code, err), (code, err)
        assert "free" in err
        filler.unlink()
        code, _, err = run(command, GOOD_WORDS[command], folder, byte_tokenizer)
        assert code == 0, err
