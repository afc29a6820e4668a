"""A data set for people: what it is, how long its rows are, what some of them say.

Cost: lengths read the ids of every row; shown rows read the shards up to the last of them.
"""

import sys
from pathlib import Path
from typing import Any

from jllm.errors import UserError

BUCKET = 512
BAR = 40
TRAINED, PADDING, PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def show_summary(folder: Path) -> None:
    """Print what the manifest says, and a histogram of row lengths.

    Raises:
        UserError: not a data set, or not an intact one.
    """
    import numpy as np

    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.dataset.shards import INPUT_IDS, ShardReader, from_list_array

    data = open_data_set(folder)
    manifest = data.manifest
    print(f"{folder}: {manifest.rows:,} rows in {len(manifest.files):,} files, made by {manifest.command}")
    if manifest.tokenizer:
        print(f"  tokenizer {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids")
    for name in ("tokens", "trained_tokens"):
        if manifest.total(name) is not None:
            print(f"  {name} {manifest.total(name):,}")
    for name in ("documents", "document_tokens", "engine", "chat", "bad_records"):
        if manifest.extra.get(name):
            print(f"  {name} {manifest.extra[name]}")
    print(f"  fingerprint {manifest.fingerprint[:16]}")
    counts = np.zeros(1, dtype=np.int64)
    longest = 0
    for path in data.paths:
        for batch in _column(ShardReader(path), INPUT_IDS):
            lengths = np.diff(from_list_array(batch.column(INPUT_IDS))[1])
            longest = max(longest, int(lengths.max(initial=0)))
            found = np.bincount(np.maximum(lengths - 1, 0) // BUCKET)
            counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
            counts[: len(found)] += found
    print(f"row lengths, longest {longest:,}:")
    for bucket in np.flatnonzero(counts).tolist():
        bar = "#" * max(1, round(BAR * int(counts[bucket]) / int(counts.max())))
        print(f"  {bucket * BUCKET + 1:>8,} - {(bucket + 1) * BUCKET:>8,}  {int(counts[bucket]):>12,}  {bar}")


def _column(reader: Any, name: str) -> Any:
    for group in range(reader.metadata.num_row_groups):
        yield reader.read_group(group, [name])
    reader.close()


def show_rows(folder: Path, tokenizer: str | None, *, rows: int, start: int = 0, color: str = "auto") -> None:
    """Print rows `start` to `start + rows`, decoded, with the trained part green and padding dim.

    Raises:
        UserError: not a data set, or the tokenizer is not the one it was made with.
    """
    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.dataset.shards import ShardReader

    data = open_data_set(folder)
    decode = _decoder(tokenizer, data.manifest.tokenizer)
    colored = color == "always" or (color == "auto" and sys.stdout.isatty())
    number = 0
    for path in data.paths:
        for batch in ShardReader(path):
            if number + batch.num_rows > start:
                for row in batch.slice(max(0, start - number)).to_pylist():
                    if rows <= 0:
                        return
                    _show(max(number, start), row, decode, colored)
                    start, rows = start + 1, rows - 1
            number += batch.num_rows


def _decoder(name: str | None, made_with: Any) -> Any:
    if name is None:
        return lambda ids: " ".join(map(str, ids)) + " "
    from jllm.data.tokenizer.facts import load_tokenizer

    facts = load_tokenizer(name)
    if made_with is not None and made_with.sha256 != facts.sha256:
        raise UserError(f"--tokenizer {name}: the data set was made with another tokenizer ({made_with.name})")
    if facts.backend is None:
        raise UserError(f"--tokenizer {name}: has no fast backend to decode with; leave it out to see the ids")
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(facts.backend)
    return lambda ids: backend.decode(ids, skip_special_tokens=False)


def _show(number: int, row: dict[str, Any], decode: Any, colored: bool) -> None:
    ids: list[int] = row["input_ids"]
    labels = row.get("labels") or ids
    boundaries = row.get("cu_seqlens")
    real = boundaries[-1] if boundaries else len(ids)
    trained = sum(label >= 0 for label in labels[:real])
    documents = f", {len(boundaries) - 1} documents" if boundaries else ""
    print(f"--- row {number}: {real} tokens, {trained} of them in labels{documents}, {len(ids) - real} padding")
    parts = []
    begin = 0
    kinds = [PADDING if i >= real else TRAINED if labels[i] >= 0 else PLAIN for i in range(len(ids))]
    for end in range(1, len(ids) + 1):
        if end == len(ids) or kinds[end] != kinds[begin]:
            text = decode(ids[begin:end])
            marks = (
                {TRAINED: "[[", PADDING: "((", PLAIN: ""}[kinds[begin]],
                {TRAINED: "]]", PADDING: "))", PLAIN: ""}[kinds[begin]],
            )
            masked = "labels" in row or kinds[begin] == PADDING
            if colored:
                parts.append(f"{kinds[begin]}{text}{PLAIN}")
            else:
                parts.append(f"{marks[0]}{text}{marks[1]}" if masked else text)
            begin = end
    print("".join(parts))


def show_verified(folder: Path) -> None:
    from jllm.data.dataset.manifest import open_data_set, verify

    data = open_data_set(folder)
    problems = verify(data)
    if problems:
        raise UserError("; ".join(problems[:3]))
    checked = sum(entry.sha256 is not None for entry in data.manifest.files)
    print(f"verified: {checked} of {len(data.manifest.files)} files have a checksum, and all of them match")
