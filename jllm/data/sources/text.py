"""Text sources: documents between blank lines, which are empty or hold white space only.

Guarantees: a document that is no UTF-8 is bad, and its neighbours are not.
Cost: one regular expression over a chunk; a Python object for each document.
"""

import re

from jllm.data.sources.records import BadRecord, Records

_BLANK = b" \t\r\f\v"
_BETWEEN_DOCUMENTS = re.compile(r"\n(?:[^\S\n]*\n)+")
_LEADING_BLANK = re.compile(r"(?:[^\S\n]*\n)+")


def last_boundary(data: bytes, searched: int, window: int) -> int:
    """The end of the last blank line in `data[:window]`; 0 where there is none, or none behind `searched`."""
    end = window
    while True:
        # The line that ends here, at `newline`, is blank when there is only white space back to the newline before it.
        newline = data.rfind(b"\n", max(0, searched - 4096), end)
        if newline < 0:
            return 0
        before = data.rfind(b"\n", 0, newline)
        if not data[before + 1 : newline].strip(_BLANK):
            return newline + 1
        end = newline


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
