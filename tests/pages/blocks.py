"""What a page shows in blocks: commands, Python, files, rules of make; and the comments that say how a block is tried.

A block is fenced, or indented by four spaces after an empty line. One that is fenced as `text` is for people; every
other one is tried as it stands. An HTML comment before a block, which no reader of the page sees, changes that and
says why:

    <!-- tried with "--num_gpus 8" as "--num_gpus 2": no test has eight GPUs -->
    <!-- only parsed: it installs packages -->
"""

import dataclasses
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]

COMMANDS, PYTHON, FILE, RULE, TEXT = "commands", "python", "file", "rule of make", "text"
_MARK = re.compile(r'<!-- (?:tried with (?P<changes>".*?" as ".*?"(?:, ".*?" as ".*?")*)|only parsed): (?P<why>.+) -->')
_CHANGE = re.compile(r'"(.*?)" as "(.*?)"')
_FENCES = {"": COMMANDS, "bash": COMMANDS, "sh": COMMANDS, "python": PYTHON, "make": RULE, "text": TEXT}
_FILE_NAME = re.compile(r"# (\S+\.\w+)\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a page.

    Attributes:
        line: where it begins, from 1.
        kind: commands, python, file (its first line is a comment with the file's name), rule of make, or text.
        only_parsed: whether its commands are not run.
        changes: texts in it that are replaced by others before it is tried.
        why: what the mark gives as the reason for either; empty without a mark.
    """

    page: Path
    line: int
    kind: str
    text: str
    only_parsed: bool = False
    changes: tuple[tuple[str, str], ...] = ()
    why: str = ""

    @property
    def tried(self) -> str:
        """The text with the changes of its mark."""
        text = self.text
        for old, new in self.changes:
            assert old in text, f"{self}: the mark changes {old!r}, which is not there"
            text = text.replace(old, new)
        return text

    @property
    def commands(self) -> list[str]:
        """Its commands as they are tried, continued lines joined."""
        lines = self.tried.replace("\\\n", " ").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]

    @property
    def file_name(self) -> str:
        """The name of a file that the page shows."""
        found = _FILE_NAME.match(self.text)
        assert found is not None
        return found[1]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    """The blocks of a page in order; `text` stands for the page's own."""
    lines = (page.read_text(encoding="utf-8") if text is None else text).split("\n")
    blocks: list[Block] = []
    at = 0
    while at < len(lines):
        begin = at
        if lines[at].startswith("```"):
            language = lines[at][3:].strip()
            at = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            blocks.append(_block(page, lines, begin, lines[begin + 1 : at], _FENCES[language]))
        elif lines[at].startswith("    ") and lines[at].strip() and _is_apart(lines, at):
            while at + 1 < len(lines) and (lines[at + 1].startswith("    ") or not lines[at + 1].strip()):
                at += 1
            blocks.append(_block(page, lines, begin, [line[4:] for line in lines[begin : at + 1]], None))
        at += 1
    return blocks


def _is_apart(lines: list[str], at: int) -> bool:
    """Whether nothing, an empty line or a comment is before this line: only then an indented one is of a block."""
    return at == 0 or not lines[at - 1].strip() or lines[at - 1].endswith("-->")


def _block(page: Path, lines: list[str], begin: int, inside: list[str], kind: str | None) -> Block:
    text = "\n".join(inside).rstrip("\n") + "\n"
    mark = _mark_before(lines, begin)
    changes = tuple(_CHANGE.findall(mark["changes"])) if mark is not None and mark["changes"] else ()
    return Block(
        page=page,
        line=begin + 1,
        kind=kind or _kind_of(text),
        text=text,
        only_parsed=mark is not None and not changes,
        changes=changes,
        why=mark["why"] if mark is not None else "",
    )


def _mark_before(lines: list[str], begin: int) -> "re.Match[str] | None":
    """The mark whose comment is the paragraph, or the line, before a block."""
    end = begin - 1 if begin and not lines[begin - 1].strip() else begin
    start = end
    while start and lines[start - 1].strip():
        start -= 1
        if lines[start].startswith("<!--"):
            break
    comment = " ".join(line.strip() for line in lines[start:end])
    if not comment.startswith("<!--") or not comment.endswith("-->"):
        return None
    found = _MARK.fullmatch(comment)
    assert found is not None, f"{comment}: no mark that is known, or without a reason"
    return found


def _kind_of(text: str) -> str:
    if re.match(r"(?:from|import) \w", text):
        return PYTHON
    if _FILE_NAME.match(text):
        return FILE
    return RULE if re.match(r"[a-z-]+:(?: .*)?\n\t", text) else COMMANDS


def code_spans(page: Path) -> list[str]:
    """What the running text of a page has between backticks, tables included."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<=\n)\n(?:    .*\n)+", "\n", text)
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def alternatives(span: str) -> list[str]:
    """What a span stands for: `a b|c` is `a b` and `a c`."""
    found = re.match(r"(.* )(\w+(?:\|\w+)+)( .*|$)", span)
    return [f"{found[1]}{word}{found[3]}" for word in found[2].split("|")] if found is not None else [span]
