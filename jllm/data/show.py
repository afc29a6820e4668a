"""A data set for people: what it is, how long its rows are, what some of them say.

Cost: lengths read the ids of every row; shown rows read the shards up to the last of them.
"""

import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, INPUT_IDS, REF_LOGPS, Int64, from_list_array
from jllm.data.dataset.describe import further_columns
from jllm.data.dataset.manifest import JOINED, PREFERENCE, DataSet
from jllm.data.dataset.reader import ShardReader
from jllm.errors import printable, say

Decode = Callable[[Sequence[int]], str]

MOST_BARS = 16
BAR = 40
SHOWN_ELEMENTS = 16
TRAINED, PADDING, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def show_summary(data: DataSet) -> None:
    """Print what the manifest says, further columns, and a histogram of row lengths.

    Raises:
        UserError: a file cannot be read.
    """
    manifest = data.manifest
    kind = f" of {manifest.kind}{' pairs' * (manifest.kind == PREFERENCE)}" if manifest.kind is not None else ""
    made = "no manifest" if manifest.command == JOINED else f"made by {manifest.command}"
    say(f"{data.folder}: {manifest.rows:,} rows{kind} in {len(manifest.files):,} files, {made}")
    if manifest.tokenizer:
        say(f"  tokenizer {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids")
    for name in ("tokens", "trained_tokens"):
        if manifest.total(name) is not None:
            say(f"  {name} {manifest.total(name):,}")
    for name in ("documents", "document_tokens", "engine", "chat"):
        if manifest.extra.get(name):
            say(f"  {name} {_fact(manifest.extra[name])}")
    if manifest.reference is not None:
        say(f"  reference {_fact(manifest.reference)}")
    for kind, found in (manifest.extra.get("bad_records") or {}).items():
        say(f"  bad {found['count']:,} x {kind}; first: {found['examples'][0] if found['examples'] else 'unknown'}")
    further = further_columns(data.paths, data.folder)
    for column in further.carried:
        say(f"  column {column.name} {column.type_name}")
    for name, reason in sorted({**manifest.further.left_out, **further.left_out}.items()):
        say(f"  column {name} left out: {reason}")
    say(f"  fingerprint {manifest.fingerprint[:16]}")
    counts = np.zeros(1, dtype=np.int64)
    for path in data.paths:
        for batch in _ids(path):
            found = np.bincount(np.diff(from_list_array(batch.column(INPUT_IDS))[1]))
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
    say(f"row lengths, longest {len(counts) - 1:,}:")
    bars = histogram(counts)
    most = max((rows for _, _, rows in bars), default=1)
    for first, last, rows in bars:
        bar = "#" * max(1, round(BAR * rows / most))
        say(f"  {first:>8,} - {last:>8,}  {rows:>12,}  {bar}")


def histogram(counts: Int64) -> list[tuple[int, int, int]]:
    """Rows by length, in at most `MOST_BARS` ranges of one width, a power of two: first, last, number of rows.

    Args:
        counts: [longest + 1] rows of each length; those of none are counted with the shortest.
    """
    longest = len(counts) - 1
    width = 1
    while -(-longest // width) > MOST_BARS:
        width *= 2
    bucket = np.maximum(np.arange(longest + 1) - 1, 0) // width
    sums = np.bincount(bucket, weights=counts).astype(np.int64)
    return [(each * width + 1, (each + 1) * width, int(sums[each])) for each in np.flatnonzero(sums).tolist()]


def _fact(value: Any) -> str:
    """What a manifest says, for people: no more than one level of names, and nothing that is empty."""
    if isinstance(value, dict):
        facts = [
            f"{name.replace('_', ' ')} {_fact(item)}" for name, item in value.items() if item not in (None, "", [], {})
        ]
        return ", ".join(facts)
    if isinstance(value, list):
        return "; ".join(map(_fact, value))
    return f"{value:,}" if type(value) is int else str(value)


def _ids(path: Path) -> Iterator[pa.RecordBatch]:
    reader = ShardReader(path)
    for group in range(reader.metadata.num_row_groups):
        yield reader.read_group(group, [INPUT_IDS])
    reader.close()


def show_rows(data: DataSet, decode: Decode | None, *, rows: int, start: int = 0, color: str = "auto") -> None:
    """Print rows `start` to `start + rows`: decoded (None: their ids), with trained tokens green and padding dim, and
    below them their further columns; preference pairs side by side."""
    colored = color == "always" or (color == "auto" and sys.stdout.isatty())
    number = 0
    for path in data.paths:
        for batch in ShardReader(path):
            if number + batch.num_rows > start:
                for row in batch.slice(max(0, start - number)).to_pylist():
                    if rows <= 0:
                        return
                    show = show_pairs if data.manifest.kind == PREFERENCE else show_row
                    show(max(number, start), row, decode or _plain, colored=colored)
                    start, rows = start + 1, rows - 1
            number += batch.num_rows


def _plain(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) + " "


def show_row(number: int, row: dict[str, Any], decode: Decode, *, colored: bool) -> None:
    """Print one row, as `show_rows` does."""
    ids: list[int] = row["input_ids"]
    labels = row.get("labels") or ids
    boundaries = row.get("cu_seqlens")
    real = boundaries[-1] if boundaries else len(ids)
    starts = {0, *(boundaries or ())}  # what nothing comes before is never predicted
    trained = sum(label >= 0 and i not in starts for i, label in enumerate(labels[:real]))
    documents = f", {len(boundaries) - 1} documents" if boundaries else ""
    say(f"--- row {number}: {real} tokens, {trained} of them trained{documents}, {len(ids) - real} padding")
    shown = []
    begin = 0
    kinds = [PADDING if i >= real else TRAINED if labels[i] >= 0 else PLAIN for i in range(len(ids))]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[begin]:
            text = printable(decode(ids[begin:end]))
            marks = (
                {TRAINED: "[[", PADDING: "((", PLAIN: ""}[kinds[begin]],
                {TRAINED: "]]", PADDING: "))", PLAIN: ""}[kinds[begin]],
            )
            masked = "labels" in row or kinds[begin] == PADDING
            if colored:
                shown.append(f"{kinds[begin]}{text}{PLAIN}")
            else:
                shown.append(f"{marks[0]}{text}{marks[1]}" if masked else text)
            begin = end
    say("".join(shown), styled=True)
    for name in [name for name in row if name not in COLUMNS]:
        say(f"{name}: {_value(row[name])}")


def show_pairs(number: int, row: dict[str, Any], decode: Decode, *, colored: bool) -> None:
    """Print the pairs of one row: the prompt, and below it the chosen answer beside the rejected one."""
    bounds = row["cu_seqlens"]
    width = (min(shutil.get_terminal_size((120, 24)).columns, 200) - 3) // 2
    say(
        f"--- row {number}: {bounds[-1]} tokens, {len(bounds) // 2} pairs, {len(row['input_ids']) - bounds[-1]} padding"
    )
    references = row.get(REF_LOGPS.name)
    for first in range(0, len(bounds) - 2, 2):
        sides, heads, prompt = [], [], ""
        for which, side in enumerate(("chosen", "rejected")):
            begin, end = bounds[first + which : first + which + 2]
            ids, labels = row["input_ids"][begin:end], row["labels"][begin:end]
            answer = next((at for at, label in enumerate(labels) if label >= 0), len(ids))
            prompt = printable(decode(ids[:answer]))
            reference = f", reference {references[first + which]:.2f}" if references else ""
            trained = sum(label >= 0 for label in labels[1:])
            heads.append(f"{side}: {len(ids)} tokens, {trained} trained{reference}")
            lines = printable(decode(ids[answer:])).split("\n")
            sides.append([part for line in lines for part in textwrap.wrap(line, width) or [""]])
        say(f"pair {first // 2}, prompt: {prompt}")
        say(f"{heads[0]:<{width}} | {heads[1]}")
        for left, right in itertools.zip_longest(*sides, fillvalue=""):
            both = (f"{left:<{width}}", right)
            say(f"{TRAINED}{both[0]}{PLAIN} | {TRAINED}{both[1]}{PLAIN}" if colored else " | ".join(both), styled=True)


def _value(value: Any) -> str:
    """A value of a further column, long lists cut."""
    if isinstance(value, list):
        more = f", ... {len(value)} in all" if len(value) > SHOWN_ELEMENTS else ""
        return f"[{', '.join(map(_value, value[:SHOWN_ELEMENTS]))}{more}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return str(np.float32(value)) if isinstance(value, float) else str(value)
