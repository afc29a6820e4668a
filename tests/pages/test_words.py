"""What the running text of the pages names between backticks is there: commands, options and their values, names."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from jllm.cli import COMMANDS
from tests.pages.blocks import PAGES, ROOT, alternatives, code_spans
from tests.pages.parsers import check_known, command_of, flags_of, is_theirs

CALLS = re.compile(
    r"(?:jllm [a-z]|python -m jllm|python \w+/\w+\.py|\w+_jobs/\w+\.py|make [a-z]|deepspeed |pip install )"
)
ABOUT_THE_PAST = ("decisions.md", "measurements.md")
"""They name what was tried and left, of ours and of other projects."""
PRESENT = [page for page in PAGES if page.name not in ABOUT_THE_PAST]


def all_commands() -> list[click.Command]:
    """Every command of ours: of the package, the Spark jobs, the tools and the benchmarks."""
    scripts = [path.relative_to(ROOT) for folder in ("spark_jobs", "tools") for path in ROOT.glob(f"{folder}/*.py")]
    lines = [["jllm", name] for name in COMMANDS] + [["python", str(script)] for script in scripts]
    return [found[0] for found in map(command_of, lines) if found is not None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for span in code_spans(page):
        if CALLS.match(span):
            for either in alternatives(span):
                check_known(either if not either.startswith("spark_jobs") else f"spark-submit {either}")


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_options_exist_and_take_the_values_that_are_shown(page: Path) -> None:
    commands = all_commands()
    wrong = []
    for span in code_spans(page):
        if not re.match(r"--?[A-Za-z]", span):
            continue
        words = shlex.split(span)
        for at, word in enumerate(words):
            if re.match(r"--?[A-Za-z]", word):
                flag, given, value = word.partition("=")
                following = value if given else (words[at + 1] if at + 1 < len(words) else None)
                if not any(takes(command, flag, following) for command in commands) and not of_another_project(flag):
                    wrong.append(span)
    assert not wrong


def of_another_project(flag: str) -> bool:
    return any(is_theirs(flag, name) for name in ("spark-submit", "deepspeed"))


def takes(command: click.Command, flag: str, value: str | None) -> bool:
    """Whether a command has this flag, and the value, unless it stands for others (`N`, `FOLDER`), is of its kind."""
    if flag not in flags_of(command):
        return False
    found = [each for each in command.params if flag in (*each.opts, *each.secondary_opts)]
    if value is None or not found or value.startswith("-") or re.fullmatch(r"[A-Z][A-Z.=]*", value):
        return True
    if isinstance(found[0], click.Option) and found[0].is_flag:
        return False
    try:
        found[0].type.convert(value, found[0], None)
    except click.ClickException:
        return False
    return True


def words_of_the_code() -> set[str]:
    """Every identifier in what is not a page, or about pages."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    places = ("jllm/", "spark_jobs/", "tools/", "benchmarks/", "tests/", "Makefile")
    names = [name for name in listing.stdout.splitlines() if name.startswith(places)]
    names = [name for name in names if not name.startswith("tests/pages/") and not name.endswith(".md")]
    return {word for name in names for word in re.findall(r"\w+", (ROOT / name).read_text(encoding="utf-8"))}


@pytest.mark.parametrize("page", PRESENT, ids=lambda page: page.name)
def test_names_exist(page: Path) -> None:
    """Functions, fields, columns, files: a name with an underscore, or with dots, is in the code by that name."""
    known = words_of_the_code()
    named = [span for span in code_spans(page) if re.fullmatch(r"[A-Za-z_]\w*(?:\.\w+)*(?:\(\))?", span)]
    named = [span for span in named if "_" in span.strip("_") or ("." in span and not span.startswith("spark."))]
    gone = [span for span in named if not set(re.findall(r"\w+", span)) - {"py", "md", "json"} <= known]
    assert not gone


def test_what_is_gone_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "`jllm shuffle` and `encoder_of` and ``not `this` `` and\n\n    `nor_this`\n\n```bash\n`or this`\n```\n"
    )
    assert code_spans(page)[:2] == ["jllm shuffle", "encoder_of"]
    assert "nor_this" not in code_spans(page)
    commands = all_commands()
    for flag, value in (("--gone", None), ("--packing", "worst_fit"), ("--cores", "many"), ("--stack", "yes")):
        assert not any(takes(command, flag, value) for command in commands), flag
    for flag, value in (("--packing", "best_fit"), ("--cores", "N"), ("-C", None), ("--threads", None)):
        assert any(takes(command, flag, value) for command in commands), flag
    with pytest.raises(AssertionError):
        check_known(alternatives("jllm checkpoint list|verify --gone RUN")[1])
