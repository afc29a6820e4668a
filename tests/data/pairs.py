"""Preference pairs for tests: records, and data sets made of them by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jllm.data.dataset.manifest import PREFERENCE, Manifest, entry_of_written, write_manifest
from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, LABELS, ShardWriter
from jllm.data.packing.best_fit import BestFitPacker
from jllm.data.packing.documents import Documents

Pair = tuple[list[int], list[int], list[int]]
"""Prompt, chosen and rejected answer, as ids."""


def random_pairs(count: int, *, vocab: int = 64, longest: int = 9, seed: int = 0) -> list[Pair]:
    """Pairs of different answers of one to `longest` tokens."""
    random = np.random.default_rng(seed)

    def some(least: int) -> list[int]:
        return random.integers(3, vocab, random.integers(least, longest + 1)).tolist()  # type: ignore[no-any-return]

    found = []
    while len(found) < count:
        pair = (some(2), some(1), some(1))
        if pair[1] != pair[2]:
            found.append(pair)
    return found


def documents_of_pairs(pairs: list[Pair]) -> Documents:
    """As an encoder makes them."""
    ids, labels, lengths = [], [], []
    for prompt, *answers in pairs:
        for answer in answers:
            ids += prompt + answer
            labels += [-100] * len(prompt) + answer
            lengths.append(len(prompt) + len(answer))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    flat = Documents(ids=np.array(ids, np.int32), offsets=offsets, labels=np.array(labels, np.int32))
    return flat.in_pairs()


def write_pairs(
    folder: Path, pairs: list[Pair], *, length: int = 64, per_file: int = 1 << 30, pad: bool = False
) -> Path:
    """A preference data set of packed rows, `per_file` rows a file; the folder."""
    packer = BestFitPacker(length, labels=True, pairs=True, pad_to=length if pad else None)
    assert packer.feed(documents_of_pairs(pairs)) is None
    entries = []
    for batch in packer.finish():
        for start in range(0, batch.num_rows, per_file):
            path = folder / f"set-{len(entries):05d}" / f"set-{len(entries):05d}-00000.zstd.parquet"
            path.parent.mkdir(parents=True)
            with ShardWriter(path, columns=(INPUT_IDS, LABELS, CU_SEQLENS)) as writer:
                writer.write(batch.slice(start, per_file))
            entries.append(entry_of_written(path, folder, writer.statistics))
    write_manifest(
        folder, Manifest(command="test", options={}, files=tuple(entries), labels_checked=True, kind=PREFERENCE)
    )
    return folder


def pairs_of_row(row: dict[str, Any]) -> list[Pair]:
    """The pairs of a packed row, checked against its contract."""
    bounds, ids, labels = row["cu_seqlens"], row["input_ids"], row["labels"]
    assert len(bounds) % 2 == 1
    found = []
    for at in range(0, len(bounds) - 1, 2):
        sides = []
        for low, high in ((bounds[at], bounds[at + 1]), (bounds[at + 1], bounds[at + 2])):
            asked = next(i for i in range(low, high) if labels[i] != -100) - low
            assert all(label == -100 for label in labels[low : low + asked])
            sides.append((ids[low : low + asked], ids[low + asked : high]))
        assert sides[0][0] == sides[1][0], "both sides repeat the prompt"
        found.append((sides[0][0], sides[0][1], sides[1][1]))
    return found


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return path
