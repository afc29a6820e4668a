"""What the pages say of every data command, tried on their own lines: `-C`, mistakes, and commands that are killed."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.pages.lines import PAGES_WITH_LINES, Line, data_lines, end, lay_out_page, mistakes, run_here, start
from tests.pages.session import checksums

KILLS = max(1, int(float(os.environ.get("JLLM_TEST_SIZE", "1"))))
MADE = pytest.mark.parametrize("page", PAGES_WITH_LINES, ids=lambda page: page.name)


def stray_files(output: Path) -> list[Path]:
    """Files of other people in an output, and in what was held out of it: beside the command's own, and among them."""
    held_out = output.parent / "_eval" / output.name
    return [path for folder in (output, held_out) if folder.is_dir() for path in _strays_in(folder)]


def _strays_in(folder: Path) -> list[Path]:
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
    strays = [folder / "notes.txt", folder / "mine" / "list.csv", *(path / "readme" for path in inside)]
    for path in strays:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of jllm")
    return strays


def changed_options(line: Line) -> list[str]:
    """Options with which the output would be another."""
    return ["--max_len", "77"] if line.command.name == "raw2ids" else ["--seed", "77"]


@MADE
def test_clean_removes_what_the_command_wrote_after_the_options_were_found_right(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    lay_out_page(page, folder)
    for line in data_lines(page):
        done = run_here(line, folder)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        if not line.has("--clean"):
            continue
        made = checksums(folder)
        strays = stray_files(folder / line.output)
        both = checksums(folder)

        refused = run_here(line, folder, *changed_options(line))
        assert refused.returncode == 2, f"{line}: {refused.stdout}"
        [mistake] = mistakes(refused.stderr)
        assert "-C" in mistake or "--clean" in mistake, mistake
        assert changed_options(line)[0].strip("-") in mistake, mistake
        assert checksums(folder) == both, f"{line}: refused, and something changed"

        for wrong in (["--gone"], ["--cores", "many"], ["--tokenizer" if line.has("--tokenizer") else "-d", "nowhere"]):
            done = run_here(line, folder, "-C", *wrong)
            assert done.returncode == 2, f"{line} {wrong}: {done.stdout}"
            assert checksums(folder) == both, f"{line} -C {wrong}: something changed"

        done = run_here(line, folder, "-C", *changed_options(line))
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert all(path.is_file() for path in strays), f"{line}: removed what is not its own"
        assert checksums(folder) != both
        done = run_here(line, folder, "-C")
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert checksums(folder) == both, f"{line}: another result"
        for path in strays:
            path.unlink()
            if path.parent.name == "mine":
                path.parent.rmdir()
        assert checksums(folder) == made


@MADE
def test_a_mistake_is_one_line_and_leaves_everything_as_it_was(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    lay_out_page(page, folder)
    for line in data_lines(page):
        before = checksums(folder)
        option = next(flag for flag in ("-i", "-d", "") if line.has(flag) or not flag)
        lines = [[*line.words, "--gone"], [*line.words, "--cores", "many"]]
        if option:  # the last of an option that is given once counts; inputs may be repeated
            lines.append([*line.words, option, "nowhere"])
        else:
            lines.append(["nowhere", *line.words[1:]])
        for words in lines:
            done = run_here(Line(block=line.block, command=line.command, words=tuple(words)), folder)
            assert done.returncode == 2, f"{line}: {words}: {done.stdout}"
            assert len(mistakes(done.stderr)) == 1, done.stderr
            assert done.stderr.splitlines()[-1] == mistakes(done.stderr)[0], done.stderr
            assert checksums(folder) == before, f"{line}: {words}: something changed"
        done = run_here(line, folder)
        assert done.returncode == 0, f"{line}: {done.stderr}"


@pytest.mark.slow
@pytest.mark.timeout(300 * KILLS)
@MADE
def test_a_killed_line_is_finished_by_the_same_line(page: Path, tmp_path: Path) -> None:
    """Killed at a random moment, with all that it started; then run again. The result is the undisturbed one."""
    folder, undisturbed = tmp_path / "here", tmp_path / "undisturbed"
    lay_out_page(page, folder)
    shutil.copytree(folder, undisturbed, symlinks=True)
    rng = random.Random(7)
    killed = 0
    for line in data_lines(page):
        if "--verify" in line.words:
            continue
        begin = time.monotonic()
        process = start(line, undisturbed)
        process.join(120)
        assert process.exitcode == 0, line
        seconds = time.monotonic() - begin
        expected = checksums(undisturbed)
        before = tmp_path / "before"
        shutil.copytree(folder, before, symlinks=True)
        for _ in range(KILLS):
            shutil.rmtree(folder)
            shutil.copytree(before, folder, symlinks=True)
            of_line = 0
            for _ in range(8):
                process = start(line, folder)
                process.join(rng.uniform(0.01, seconds))
                at_work = process.is_alive()
                end(process)
                of_line += at_work
                if of_line == 2:
                    break
                if not at_work:  # it is faster than it was; begin anew
                    seconds = max(0.02, seconds / 2)
                    shutil.rmtree(folder)
                    shutil.copytree(before, folder, symlinks=True)
            killed += of_line
            process = start(line, folder)
            process.join(120)
            assert process.exitcode == 0, line
            assert checksums(folder) == expected, line
        shutil.rmtree(before)
    assert killed, "no line was killed at work"
