"""The readers, each with valid files that are changed before they are read."""

import functools
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from safetensors.torch import save

from jllm.data.chat.builtin_templates import TEMPLATES
from jllm.data.chat.formats import commonest_format
from jllm.data.chat.rendered import render_chunk
from jllm.data.chat.rendering import RenderPlan
from jllm.data.dataset.manifest import MANIFEST_NAME, open_data_set, read_manifest
from jllm.data.dataset.reader import ShardReader
from jllm.data.shuffle.mix import read_mix
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import texts_of
from jllm.data.tokenizer import cache
from jllm.data.tokenizer.facts import _known_facts
from jllm.guards import caches
from jllm.models.weights.source import check_plain_weights, model_info, read_metadata, stored_dtype, weight_files
from jllm.options import read_toml
from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.format import CHECKSUM, checksum_of_index
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.regions import Region
from jllm.train.config import TrainConfig
from jllm.train.records.curves import plot
from tests.fixtures import random_rows, write_rows
from tests.security.fuzz.harness import Target
from tests.security.fuzz.mutation import changed_bytes, changed_json
from tests.train.checkpoint.written import write_checkpoint

CHATS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "", "tool_calls": [
                      {"type": "function", "function": {"name": "f", "arguments": {"x": [1, {"y": None}]}}}]},
                  {"role": "tool", "content": "3"}, {"role": "assistant", "content": "<think>t</think>b"}],
     "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
         "type": "object", "properties": {"x": {"type": "array"}}}}}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "i", "input": "", "output": "o"},
]  # fmt: skip
TEXTS = [{"text": "one two"}, {"text": "three", "n": 1.5}, {"text": "é\nf"}]
CONFIG = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2,
          "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 9, "max_position_embeddings": 64,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": False,
          "eos_token_id": [1, 2], "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "layer_types": None}  # fmt: skip
CONFIGS = [
    CONFIG,
    {**CONFIG, "model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 9},
    {**CONFIG, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
    {**CONFIG, "model_type": "gemma3_text", "head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]},
]
METRICS = [
    {"step": 0, "event": "start", "run": "r", "time": "2026-01-01T00:00:00+00:00"},
    *({"step": step, "epoch": 0.1, "loss": 2.0 / (step + 1), "lr": 1e-4, "grad_norm": 1.0, "seconds": 0.1,
       "tokens_per_second": 1e3, "consumed_tokens": 10 * step, "memory_mib": [1, 2], "data_wait": 0.0,
       "time": f"2026-01-01T00:00:{step:02d}+00:00"} for step in range(1, 9)),
    {"step": 4, "name": "eval", "eval_loss": 2.0, "eval_tokens": 10, "perplexity": 7.0, "accuracy": 0.1},
    {"step": 5, "event": "spike"},
]  # fmt: skip
TRACE = {"format": 1, "step": 3, "clock_error": 0.0, "processes": [
    {"stage": 0, "pipeline": 0, "spans": [
        {"kind": "forward", "start": 0.0, "end": 1.0, "micro_batch": 0}]}]}  # fmt: skip
TOML = b'max_steps = 5\nlr = 1e-4\ntrain_data = ["a", "b"]\nsave_steps = 2\n[x]\ny = [1, {z = 2}]\n'
MIX = b'by = "rows"\ntotal = 10\n[sets]\na = 1.0\nb = {weight = 2}\n[[sources]]\nname = "c"\n'
VALUES_OF_TOML = (
    *(
        b"1e999",
        b"9" * 10_000,
        b"[" * 50_000,
        b'"x"',
        b"[1, 2]",
        b"{a = 1}",
        b"nan",
        b"-1",
        b"true",
        b"",
        b"0x" + b"f" * 99,
    ),
)
FACTS: dict[str, Any] = {
    "name": "t", "path": "t", "backend": None, "pre_tokenizer": None, "vocab_size": 9, "sha256": "a",
    "vocabulary_sha256": "b", "prefix": [], "suffix": [1], "eos_id": 1, "pad_id": None, "special_tokens": {},
    "added": [{"id": 1, "content": "x", "special": True}], "chat_template": None, "chat_templates": {}, "probes": ["a"],
    "probe_ids": [[1]], "probe_special_ids": [[1]], "transformers_version": "5", "tokenizers_version": "0",
}  # fmt: skip
PLAN = RenderPlan(
    template=TEMPLATES["chatml"], special_tokens={}, added=({"id": 1, "content": "<|im_end|>", "special": True,
    "lstrip": False, "rstrip": False},), date="2026-01-01", eos_id=1,
)  # fmt: skip


def _records(data: bytes, kind: str, name: str) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        content = data
        if kind == "jsonl" and rng.random() < 0.7:
            rows = CHATS if b"messages" in data else TEXTS
            content = b"\n".join(changed_json(row, rng) for row in rows)
        elif kind == "json" and rng.random() < 0.7:
            content = changed_json(CHATS, rng, indent=rng.choice((None, 1)))
        elif rng.random() < 0.9:
            content = changed_bytes(data, rng)
        if name.endswith(".gz"):
            content = gzip.compress(content)
        elif name.endswith(".zst"):
            content = zstandard.ZstdCompressor().compress(content)
        if name.endswith((".gz", ".zst")) and rng.random() < 0.5:
            content = changed_bytes(content, rng)
        (folder / name).write_bytes(content)

    return change


MOST_LINES = 50_000
"""A compressed file that was changed may hold a thousand times its size, and takes as long as that is: no finding."""


def _read_records(folder: Path) -> None:
    [path] = folder.iterdir()
    [source] = resolve([str(path)])
    for chunk in read_chunks(source, 0, most=1 << 20):
        records = parse_chunk(chunk, source.kind)
        texts_of(records, source.kind, "text")
        if chunk.end_line > MOST_LINES:
            return
        if source.kind == "text":
            continue
        names = ["messages", "roles", "sharegpt", "alpaca", "completion"]
        for name in {*names, commonest_format(records.values, "-i") if records.values else "messages"}:
            render_chunk(chunk, source.kind, name, {}, PLAN)


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_pylist([{"text": "a", "messages": CHATS[0]["messages"]}] * 3), sink, compression="zstd"
    )
    return sink.getvalue().to_pybytes()


@functools.cache
def _valid(name: str) -> dict[str, bytes]:
    """The files of a valid data set, checkpoint or model, by their paths."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="jllm-fuzz-") as place:
        folder = Path(place)
        if name == "set":
            write_rows(folder, random_rows(20, labels=True, packed=True))
        elif name == "checkpoint":
            folder = write_checkpoint(folder, [[Region.of((4, 6), start=0, stop=24)]])
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _lay(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _changed(data: bytes, rng: random.Random) -> bytes:
    """JSON, changed in its structure or its bytes."""
    return changed_json(json.loads(data), rng) if rng.random() < 0.8 else changed_bytes(data, rng)


def _change_manifest(folder: Path, rng: random.Random) -> None:
    files = _valid("set")
    _lay(folder, {**files, MANIFEST_NAME: _changed(files[MANIFEST_NAME], rng)})


def _read_manifest(folder: Path) -> None:
    read_manifest(folder)
    open_data_set(folder)


def _change_shard(folder: Path, rng: random.Random) -> None:
    files = _valid("set")
    name = next(name for name in files if name.endswith(".parquet"))
    (folder / "a.parquet").write_bytes(changed_bytes(files[name], rng))


def _read_shard(folder: Path) -> None:
    reader = ShardReader(folder / "a.parquet")
    for group in range(reader.metadata.num_row_groups):
        reader.read_group(group)


def _change_index(folder: Path, rng: random.Random) -> None:
    files = _valid("checkpoint")
    name = INDEX_NAME
    data = _changed(files[name], rng)
    if rng.random() < 0.8:  # somebody who makes checksums fit
        try:
            value = json.loads(data)
            value[CHECKSUM] = checksum_of_index(value)
            data = json.dumps(value).encode()
        except (ValueError, TypeError, RecursionError, AttributeError):
            pass
    _lay(folder, {**files, name: data})


def _read_index(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for key in list(reader._index["tensors"]):
        kind, _, name = key.partition("/")
        shape = reader.shape(kind, name)
        if shape:
            reader.read(kind, name, Region.of(shape, start=0, stop=1))
    reader.check_all()


def _change_weight_index(folder: Path, rng: random.Random) -> None:
    index = {"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    _lay(folder, {"x.safetensors": _tensors(), "y.safetensors": _tensors()})
    (folder / "model.safetensors.index.json").write_bytes(_changed(json.dumps(index).encode(), rng))


def _tensors() -> bytes:
    return save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, metadata={"format": "pt"})


def _change_header(folder: Path, rng: random.Random) -> None:
    data = _tensors()
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.7:
        header = changed_json(json.loads(data[8 : 8 + size]), rng)
        length = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**40, 2**63, 2**64 - 1))
        data = length.to_bytes(8, "little") + header + data[8 + size :]
    else:
        data = changed_bytes(data, rng)
    (folder / "model.safetensors").write_bytes(data)


def _read_weights(folder: Path) -> None:
    weight_files(folder)
    check_plain_weights(folder)
    stored_dtype(folder)
    for path in weight_files(folder):
        read_metadata(path)


def _change_config(folder: Path, rng: random.Random) -> None:
    (folder / "config.json").write_bytes(_changed(json.dumps(rng.choice(CONFIGS)).encode(), rng))


def _read_config(folder: Path) -> None:
    model_info(folder, with_weights=False)


def _change_metrics(folder: Path, rng: random.Random) -> None:
    lines = [json.dumps(record).encode() for record in METRICS]
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(lines))
        lines[at] = changed_json(METRICS[at % len(METRICS)], rng)
    data = b"\n".join(lines) + b"\n"
    (folder / "metrics.jsonl").write_bytes(data if rng.random() < 0.8 else changed_bytes(data, rng))


def _change_trace(folder: Path, rng: random.Random) -> None:
    (folder / "trace-step-3.json").write_bytes(_changed(json.dumps(TRACE).encode(), rng))


def _change_toml(data: bytes) -> Callable[[Path, random.Random], None]:
    def change(folder: Path, rng: random.Random) -> None:
        content = data
        for _ in range(rng.choice((1, 2, 3))):
            lines = content.split(b"\n")
            at = rng.randrange(len(lines))
            key = lines[at].partition(b"=")[0]
            new = rng.choice(VALUES_OF_TOML)
            lines[at] = key + b"= " + new
            content = b"\n".join(lines) if rng.random() < 0.8 else changed_bytes(content, rng)
        (folder / "a.toml").write_bytes(content)

    return change


def _read_mix(folder: Path) -> None:
    read_mix([str(folder / "a.toml")], by=None, total=None, max_tokens=[])


def _change_entry(folder: Path, rng: random.Random) -> None:
    place = folder / "jllm" / "things"
    content = _changed(json.dumps(FACTS).encode(), rng)
    caches.write(place / "a.jsonl", content)
    if rng.random() < 0.2:
        path = place / "a.jsonl"
        path.write_bytes(changed_bytes(path.read_bytes(), rng))


def _read_entry(folder: Path) -> None:
    kept = cache.read(folder / "jllm" / "things" / "a.jsonl")
    if kept is not None:
        _known_facts(kept)


LINES_OF_CHATS = b"\n".join(json.dumps(row).encode() for row in CHATS)
LINES_OF_TEXTS = b"\n".join(json.dumps(row).encode() for row in TEXTS)
TARGETS = [
    Target(name="text", change=_records(b"one\ntwo\n\nthree\n \nfour", "text", "a.txt"), read=_read_records),
    Target(name="texts", change=_records(LINES_OF_TEXTS, "jsonl", "a.jsonl"), read=_read_records),
    Target(name="chats", change=_records(LINES_OF_CHATS, "jsonl", "a.jsonl"), read=_read_records),
    Target(name="list", change=_records(json.dumps(CHATS).encode(), "json", "a.json"), read=_read_records),
    Target(name="gzip", change=_records(LINES_OF_CHATS, "jsonl", "a.jsonl.gz"), read=_read_records),
    Target(name="zstd", change=_records(LINES_OF_TEXTS, "jsonl", "a.jsonl.zst"), read=_read_records),
    Target(name="parquet", change=_records(_parquet(), "parquet", "a.parquet"), read=_read_records),
    Target(name="manifest", change=_change_manifest, read=_read_manifest),
    Target(name="shard", change=_change_shard, read=_read_shard),
    Target(name="checkpoint", change=_change_index, read=_read_index),
    Target(name="weight-index", change=_change_weight_index, read=_read_weights),
    Target(name="safetensors", change=_change_header, read=_read_weights),
    Target(name="config", change=_change_config, read=_read_config),
    Target(name="metrics", change=_change_metrics, read=lambda folder: plot([folder])),
    Target(name="trace", change=_change_trace, read=lambda folder: plot([folder / "trace-step-3.json"])),
    Target(name="toml", change=_change_toml(TOML), read=lambda folder: read_toml(folder / "a.toml", TrainConfig)),
    Target(name="mix", change=_change_toml(MIX), read=_read_mix),
    Target(name="cache", change=_change_entry, read=_read_entry),
]
