"""Data sets for benchmarks: token ids that compress as those of real text do.

Real text under zstd level 1 takes 1.4 to 1.55 bytes a token (measured with the Qwen3 tokenizer on web pages and
encyclopedia articles), because frequent tokens have low ids and phrases return. So rows are made of phrases of 1 to 6
tokens from a fixed table, tokens and phrases both drawn by Zipf's law, which takes 1.35. Independent Zipf ids would
take 2.0 bytes, rows cut from a small corpus again and again 1.0.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa

from jllm.data.dataset.manifest import Manifest, entry_of_written, write_manifest
from jllm.data.dataset.shards import INPUT_IDS, Int32, ShardWriter, file_name, schema, to_list_array

VOCABULARY = 151_669
PHRASES = 300_000
ROWS_AT_ONCE = 512


def _zipf(rng: np.random.Generator, kinds: int, count: int) -> Int32:
    """`count` ranks below `kinds`, rank r about as often as 1 / (r + 1)."""
    ranks: Int32 = (np.exp(rng.random(count) * np.log(kinds)) - 1).astype(np.int32)
    return ranks


class PhraseTable:
    """Phrases to build rows from."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._lengths = rng.integers(1, 7, PHRASES)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        self._tokens = _zipf(rng, VOCABULARY, int(self._lengths.sum()))

    def tokens(self, rng: np.random.Generator, count: int) -> Int32:
        """A stream of `count` tokens."""
        phrases = _zipf(rng, PHRASES, count // 3 + 1)
        lengths = self._lengths[phrases]
        ends = np.cumsum(lengths)
        begins = np.repeat(self._starts[phrases] - (ends - lengths), lengths)
        stream = np.asarray(self._tokens[begins + np.arange(int(ends[-1]))][:count], np.int32)
        return stream if len(stream) == count else np.concatenate([stream, self.tokens(rng, count - len(stream))])


def write_set(folder: Path, *, tokens: int, row_length: int, files: int) -> Path:
    """A data set of about `tokens` tokens in rows of `row_length`, in `files` files, with a manifest."""
    table = PhraseTable()
    rng = np.random.default_rng(1)
    rows = tokens // row_length
    offsets = np.arange(ROWS_AT_ONCE + 1, dtype=np.int64) * row_length
    entries = []
    for index in range(files):
        path = folder / f"{folder.name}-00000" / file_name(f"{folder.name}-00000", index, "zstd")
        left = rows * (index + 1) // files - rows * index // files
        with ShardWriter(path, columns=[INPUT_IDS]) as writer:
            while left:
                count = min(left, ROWS_AT_ONCE)
                column = to_list_array(table.tokens(rng, count * row_length), offsets[: count + 1])
                writer.write(pa.RecordBatch.from_arrays([column], schema=schema([INPUT_IDS])))
                left -= count
        entries.append(entry_of_written(path, folder, writer.statistics))
    write_manifest(folder, Manifest(command="benchmark", options={}, files=tuple(entries)))
    return folder
