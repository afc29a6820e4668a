"""Every command, Python snippet and file of the pages: it runs as it stands, and leaves what it was given as it was."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages.blocks import (
    COMMANDS,
    FILE,
    PAGES,
    PYTHON,
    ROOT,
    RULE,
    TEXT,
    Block,
    alternatives,
    blocks_of,
    code_spans,
)
from tests.pages.inputs import lay_out
from tests.pages.parsers import check_accepted, is_complete, is_here, split
from tests.pages.session import Session, checksums

WITH_BLOCKS = [page for page in PAGES if any(block.kind != TEXT for block in blocks_of(page))]


def runs_here(command: str) -> bool:
    """Whether what the command needs beside Python is on this machine."""
    return split(command)[:1] != ["spark-submit"] or is_here("spark-submit")


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    """In one folder, where each command finds what those before it made; then what the text names between backticks."""
    blocks = [block for block in blocks_of(page) if block.kind != TEXT]
    named = commands_in_the_text(page)
    folder = tmp_path / "here"
    folder.mkdir()
    lay_out(folder, "\n".join([*(block.text for block in blocks), *named]))
    for block in blocks:
        if block.kind == FILE:
            (folder / block.file_name).write_text(block.tried, encoding="utf-8")
    given = checksums(folder)
    session = Session(folder)
    for block in blocks:
        if block.kind == COMMANDS:
            for command in block.commands:
                if block.only_parsed or not runs_here(command):
                    check_accepted(command)
                    continue
                run_command(command, session)
        elif block.kind == PYTHON:
            run_python(block, session)
        elif block.kind == RULE:
            check_rule(block, folder)
        left = checksums(folder)
        changed = sorted(name for name, digest in given.items() if left.get(name) != digest)
        assert not changed, f"{block} changed its input: {changed}"

    for command in named:
        run_command(command, session)


def commands_in_the_text(page: Path) -> list[str]:
    """Whole commands of ours between backticks; one without what it needs, such as a command's name, is none."""
    spans = [either for span in code_spans(page) for either in alternatives(span)]
    found = [span for span in spans if re.match(r"jllm [a-z]|python -m jllm", span) and is_complete(span)]
    return list(dict.fromkeys(found))


def run_command(command: str, session: Session) -> None:
    done = session.run(command)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, f"{command}\n{done.stderr}"


def run_python(block: Block, session: Session) -> None:
    script = session.folder / "snippet"
    script.write_text(block.tried, encoding="utf-8")
    done = session.run(f"{sys.executable} snippet")
    assert done.returncode == 0, f"{block}:\n{done.stderr}"


def check_rule(block: Block, folder: Path) -> None:
    """A rule of make, in the Makefile of the page's folder: `make` knows what it would do."""
    rules = folder / "rules.mk"
    rules.write_text(f"BIN := .venv/bin\n.venv/.stamp-dev:\n{block.tried}", encoding="utf-8")
    target = block.text.split(":")[0]
    done = subprocess.run(
        ["make", "-n", "-f", str(rules), target], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block}: {done.stderr}"
    for command in done.stdout.splitlines():
        check_accepted(command.removeprefix(".venv/bin/"))


def test_marks_have_reasons_and_are_few() -> None:
    marked = [block for page in PAGES for block in blocks_of(page) if block.why]
    assert marked
    for block in marked:
        assert len(block.why.split()) >= 3, f"{block}: say why: {block.why}"
        assert block.kind in (COMMANDS, FILE), f"{block}: {block.kind} is always run as it stands"
    parsed = [block for block in marked if block.only_parsed]
    assert len(parsed) <= 8, [str(block) for block in parsed]


def example(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_of_every_form_are_found(tmp_path: Path) -> None:
    page = example(
        tmp_path,
        "Text\n\n    jllm models \\\n        -h  # all\n\nmore\n\n    # weights.toml\n    a = 1\n\ntext\n\n"
        "<!-- only parsed: it takes\n  an hour -->\n    make demo\n\n```text\n    a picture\n```\n\n"
        '<!-- tried with "8" as "2", "x" as "y": few are enough -->\n\n```bash\njllm x 8\n# alone\njllm x\n```\n\n'
        "    from os import path\n    path\n\n* a list\n  that goes on\n\n    rule: other ## what\n    \tdo it\n",
    )
    found = blocks_of(page)
    kinds = [COMMANDS, FILE, COMMANDS, TEXT, COMMANDS, PYTHON, RULE]
    assert [block.kind for block in found] == kinds
    assert [block.why for block in found] == ["", "", "it takes an hour", "", "few are enough", "", ""]
    assert [block.only_parsed for block in found].index(True) == 2
    assert found[0].commands[0].split() == ["jllm", "models", "-h", "#", "all"]
    assert found[1].file_name == "weights.toml"
    assert found[4].commands == ["jllm y 2", "jllm y"]
    assert [block.line for block in found][:3] == [3, 8, 15]


@pytest.mark.parametrize("comment", ["only parsed:", "only parsed", 'tried with "a" as "b"', "not run: no reason why"])
def test_a_mark_without_a_reason_is_refused(tmp_path: Path, comment: str) -> None:
    with pytest.raises(AssertionError, match="no mark that is known, or without a reason"):
        blocks_of(example(tmp_path, f"<!-- {comment} -->\n\n    make demo\n"))


@pytest.mark.parametrize(
    "command",
    [
        "jllm shufle -d D",
        "jllm shuffle -d D --num_blok 4",
        "jllm repartition -d D",
        "python -m jllm.gone -x",
        "python tools/gone" + ".py",
        "python benchmarks/stream.py --wat speed",
        "make gone",
        "pip install '.[gone]'",
        "spark-submit --mastr yarn spark_jobs/shuffle.py -d x -o y",
        "spark-submit --master yarn spark_jobs/shuffle.py -d x -o y --gone 1",
        "A=1 python -m jllm.raw2ids -i x --tokenizer t --max_len -3",
    ],
)
def test_a_command_that_is_gone_is_noticed(command: str) -> None:
    if "--mastr" in command and not is_here("spark-submit"):
        pytest.skip("no Java, or no pyspark")
    with pytest.raises(AssertionError):
        check_accepted(command)
