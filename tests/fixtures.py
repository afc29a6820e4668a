"""Small real inputs that tests make themselves: data sets and models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import CONTROL_CLASS
from jllm.data.dataset.further import FurtherColumns
from jllm.data.dataset.manifest import Manifest, entry_of_written, write_manifest
from jllm.data.dataset.shards import COLUMNS, ShardWriter, schema, to_list_array

VOCABULARY = 97


def write_rows(
    folder: Path, rows: Sequence[dict[str, Sequence[int]]], *, files: int = 1, manifest: bool = True
) -> Path:
    """A data set of these rows, dealt to `files` shards in runs; all rows have the same columns, control classes
    among them or not."""
    columns = [name for name in COLUMNS if name in rows[0]]
    further = [CONTROL_CLASS] if CONTROL_CLASS.name in rows[0] else []
    names = [*columns, *(each.name for each in further)]
    entries = []
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        path = folder / f"set-00000/set-00000-{number:05d}.zstd.parquet"
        with ShardWriter(path, columns=columns, further=further) as writer:
            arrays = [column_of([rows[i][name] for i in part]) for name in names]
            writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema(columns, further)))
        entries.append(entry_of_written(path, folder, writer.statistics))
    if manifest:
        write_manifest(
            folder,
            Manifest(
                command="test",
                options={},
                files=tuple(entries),
                further=FurtherColumns(carried=tuple(further)),
            ),
        )
    return folder


def column_of(lists: Sequence[Sequence[int]]) -> pa.ListArray:
    """Lists of integers as a shard's column."""
    offsets = np.concatenate([[0], np.cumsum([len(values) for values in lists])]).astype(np.int64)
    values = np.concatenate([np.asarray(part, dtype=np.int32) for part in lists]) if lists else np.empty(0, np.int32)
    return to_list_array(values.astype(np.int32), offsets)


def random_rows(
    count: int,
    *,
    seed: int = 0,
    longest: int = 33,
    labels: bool = False,
    packed: bool = False,
    vocabulary: int = VOCABULARY,
) -> list[dict[str, Any]]:
    """Rows of random length, with random labels masked and random document boundaries where asked for."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = rng.integers(0, vocabulary, int(rng.integers(5, longest + 1)))
        row: dict[str, Any] = {"input_ids": ids.tolist()}
        if labels:
            row["labels"] = np.where(rng.random(len(ids)) < 0.5, -100, ids).tolist()
        if packed:
            cuts = np.flatnonzero(rng.random(len(ids) - 1) < 0.15) + 1
            row["cu_seqlens"] = [0, *cuts.tolist(), len(ids)]
        rows.append(row)
    return rows


def tiny_llama(
    folder: Path,
    *,
    tied: bool,
    layers: int = 4,
    seed: int = 0,
    dtype: str = "float32",
    vocabulary: int = VOCABULARY,
) -> Path:
    """A Llama with random weights as a Hugging Face folder, large enough that layers differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def model_and_data(folder: Path, *, tied: bool, rows: int) -> Path:
    """A folder with a tiny model in `model`, and rows for it in two files of `data`."""
    tiny_llama(folder / "model", tied=tied)
    write_rows(folder / "data", random_rows(rows), files=2)
    return folder
