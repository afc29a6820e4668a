"""Text sources: documents between blank lines, which are empty or hold white space only.

Guarantees: a document that is no UTF-8 is bad, and its neighbours are not.
Cost: one regular expression over a chunk; a Python object for each document.
"""

import re

from jllm.data.sources.records import BadRecord, Records

_BLANK = b" \t\r\f\v"
_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[^\S\n]*\n)+")
_BETWEEN_BYTES = re.compile(rb"\n(?:[ \t\r\f\v]*\n)+")
_LEADING_BYTES = re.compile(rb"(?:[ \t\r\f\v]*\n)+")
_LINES_LOOKED_AT = 4096
_LEADING_BLANK = re.compile(r"(?:[^\S\n]*\n)+")


def last_boundary(data: bytes, searched: int, window: int) -> int:
    """The end of the last blank line in `data[:window]`; 0 where there is none, or none behind `searched`."""
    end, first = window, max(0, searched - 4096)
    for _ in range(_LINES_LOOKED_AT):
        # The line that ends here, at `newline`, is blank when there is only white space back to the newline before it.
        newline = data.rfind(b"\n", first, end)
        if newline < 0:
            return 0
        before = data.rfind(b"\n", 0, newline)
        if not data[before + 1 : newline].strip(_BLANK):
            return newline + 1
        end = newline
    # Millions of lines without a blank one: from here on all of them at once.
    leading = _LEADING_BYTES.match(data, 0, end)
    found = leading.end() if leading else 0
    for found_between in _BETWEEN_BYTES.finditer(data, max(0, data.rfind(b"\n", 0, first)), end):
        found = found_between.end()
    return found if found > first else 0


def record_beyond(data: bytes, most: int) -> int | None:
    """How many lines stand before the first document of more than `most` bytes; None where there is none."""
    leading = _LEADING_BYTES.match(data)
    start = leading.end() if leading else 0
    between = [(found.start(), found.end()) for found in _BETWEEN_BYTES.finditer(data, start)]
    for begin, end in [*between, (len(data) - data.endswith(b"\n"), 0)]:
        if begin - start > most:
            return data.count(b"\n", 0, start)
        start = end
    return None


def parse(data: bytes, line: int) -> Records:
    """What stands between blank lines, without the line ends around it; `line` is the number of the first line."""
    try:
        text, clean = data.decode(), True
    except UnicodeDecodeError:
        text, clean = data.decode(errors="surrogateescape"), False
    leading = _LEADING_BLANK.match(text)
    start = leading.end() if leading else 0
    documents: list[str] = []
    lines: list[int] = []
    bad: list[BadRecord] = []
    counted = 0
    stretches: list[tuple[int, int]] = []
    for separator in _BETWEEN_DOCUMENTS.finditer(text, start):
        stretches.append((start, separator.start()))
        start = separator.end()
    stretches.append((start, len(text)))
    for begin, end in stretches:
        document = text[begin:end]
        line += text.count("\n", counted, begin)
        counted = begin
        document = document.removesuffix("\n").removesuffix("\r")
        if not document or document.isspace():
            continue
        if not clean and re.search("[\udc80-\udcff]", document):
            bad.append(BadRecord(kind="not UTF-8", line=line, detail="bytes that are no UTF-8 text"))
            continue
        documents.append(document)
        lines.append(line)
    return Records(values=documents, lines=lines, bad=bad)
