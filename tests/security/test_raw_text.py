"""What data, names and templates say reaches a terminal or a page as text, never as control codes or markup."""

import ast
import html.parser
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm.errors import UserError, printable, say
from jllm.train.records.curves import plot
from jllm.train.records.svg import escape

PRINTERS = ("print", "sys.stdout.write", "sys.stderr.write", "click.secho", "traceback.print_exc")
ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ["\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "a\rb", "\u202egnp.exe", "\x08\x08", "\x00", "\u2028", "\udc9b"]


def said(*values: object, end: str = "\n") -> str:
    target = io.StringIO()
    say(*values, end=end, file=target)
    return target.getvalue()


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_said_holds_no_control_code(text: str) -> None:
    for shown in (said(text), said("a", text, end="\r"), str(UserError(f"x {text}"))):
        assert printable(shown.removesuffix("\r")) == shown.removesuffix("\r")
    assert said(Path(f"/{text}".replace("\x00", ""))).isprintable() or said("x").endswith("\n")


@given(st.lists(st.text(st.characters())))
def test_no_value_says_control_codes(values: list[str]) -> None:
    assert printable(said(*values)) == said(*values)


@given(st.text(st.characters()))
def test_no_text_of_a_page_is_markup(text: str) -> None:
    assert not set(escape(text)) & set("<>\"'\x1b\x9b")


class Seen(html.parser.HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


NAMES = ["<script>x<|script>", '"><img src=x onerror=y>', "<|title><b>", "\x1b[2J", "$\\frac$", "$a$ $b", "&lt;"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["html", "png"])
def test_names_in_a_run_are_text_of_its_page(tmp_path: Path, name: str, kind: str) -> None:
    run = tmp_path / name
    run.mkdir()
    # The folder's name is the title.
    lines = [{"step": step, "loss": 1.0, "eval_loss": 2.0} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if kind == "png":
        pytest.importorskip("matplotlib")
    output = plot([run], tmp_path / f"plot.{kind}")
    assert output.stat().st_size
    if kind == "html":
        seen = Seen()
        text = output.read_text(encoding="utf-8")
        seen.feed(text)
        assert not seen.tags & {"script", "img", "b"}
        assert not {each for each in seen.attributes if each.startswith("on")}
        assert printable(text) == text
        assert printable(run.name) in seen.text


def test_nothing_but_say_prints() -> None:
    """`print` is called by `jllm.errors` alone; streams are written to by no other name."""
    wrong = []
    for path in sorted([*(ROOT / "jllm").rglob("*.py"), *(ROOT / "spark_jobs").glob("*.py")]):
        if path in (ROOT / "jllm/errors.py", ROOT / "jllm/data/spark/session.py"):
            continue  # the rule itself, and the stream that it is printed to where the JVM has it
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in PRINTERS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong
