"""The shapes and settings of `gpu_train.py`, and the data that both sides train on. Measures nothing."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

LORA_RANK, RATE, WARM_UP = 16, 1e-5, 3

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # Layers of an 8B Llama, so few that full training fits one card.
    "wide": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 8, "num_attention_heads": 32},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and how; the same on both sides.

    Attributes:
        shape: a name of `SHAPES`.
        states: `bf16` (Kahan's sums on our side) or `fp32` masters.
        rows, length, accumulation: of a micro-batch, and how many make a step.
        mean_document: packed documents of this mean length, on our side with `--block_mask`; None: whole rows.
        lora: adapters on all linear maps train instead of the model.
        recompute: of all layers.
        pairs: the documents are the sides of preference pairs, trained by DPO; None in `mean_document` has none.
        further: of our command line alone.
        fp8: the recipe of our linear maps; the peer is then ours in bf16.
        stages: pipeline stages, on as many devices.
        slices: of each of them, on as many devices (tensor parallelism).
        runs: that rows are cut into, on as many devices (sequence parallelism).
    """

    shape: str
    states: str = "fp32"
    rows: int = 2
    length: int = 4096
    accumulation: int = 8
    mean_document: int | None = None
    lora: bool = False
    recompute: bool = False
    pairs: bool = False
    further: tuple[str, ...] = ()
    fp8: str | None = None
    stages: int = 1
    slices: int = 1
    runs: int = 1

    @property
    def devices(self) -> int:
        """How many work together."""
        return self.stages * self.slices * self.runs

    @property
    def has_weights(self) -> bool:
        """Whether ours reads them from a folder: where references are made with them, and where drawing takes long."""
        return self.pairs or self.lora

    @property
    def vocabulary(self) -> int:
        """Tokens of the vocabulary."""
        return int(llama(self.shape).vocab_size)


SETTINGS: Mapping[str, Setting] = {
    "wide-kahan": Setting(shape="wide", states="bf16"),
    "wide-masters": Setting(shape="wide"),
    "wide-fp8": Setting(shape="wide", states="bf16", fp8="tensorwise"),
    "1b-kahan": Setting(shape="1b", states="bf16", rows=4),
    "1b-masters": Setting(shape="1b", rows=4),
    "1b-memory": Setting(shape="1b", states="bf16", rows=8),
    "packed": Setting(shape="1b", rows=4, mean_document=500),
    "dpo": Setting(shape="1b", rows=4, mean_document=500, pairs=True),
    "lora-8b": Setting(shape="8b", lora=True),
    "lora-wide": Setting(shape="wide", lora=True),
    "two-stages": Setting(shape="wide", accumulation=16, stages=2),
    "two-slices": Setting(shape="wide", accumulation=16, slices=2),
    "two-runs": Setting(shape="wide", accumulation=16, runs=2),
    "tiny-two-slices": Setting(shape="tiny", length=128, accumulation=2, slices=2),
    "tiny-two-runs": Setting(shape="tiny", length=128, accumulation=2, runs=2),
    "tiny-fp8": Setting(shape="tiny", rows=2, length=128, accumulation=2, fp8="tensorwise"),
    "tiny": Setting(shape="tiny", rows=2, length=128, accumulation=2),
    "tiny-packed": Setting(shape="tiny", rows=2, length=256, accumulation=2, mean_document=40),
    "tiny-dpo": Setting(shape="tiny", rows=2, length=256, accumulation=2, mean_document=40, pairs=True),
}


def llama(shape: str) -> Any:
    """The configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 128_256, "num_key_value_heads": 8, "tie_word_embeddings": False, **SHAPES[shape]}
    return LlamaConfig(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        max_position_embeddings=8192,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


def flops_per_token(setting: Setting, *, attended: float, share: float = 1.0) -> float:
    """Operations of a forward and a backward pass: 6 x parameters in products, head too, + 6 x layers x width x S.

    The second part is causal attention. Adapters let the gradients of frozen weights out, so that products count 4
    times.

    Args:
        setting: with the shape.
        attended: S: tokens of a row; of documents the mean of the squared lengths over the mean length.
        share: of the tokens that come to the head.
    """
    config = llama(setting.shape)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = config.head_dim or width // config.num_attention_heads
    attention = width * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    products = layers * (attention + 3 * width * inner) + share * width * config.vocab_size
    return float((4 if setting.lora else 6) * products + 6 * layers * width * attended)


def documents(generator: np.random.Generator, tokens: int, mean: int) -> list[int]:
    """Lengths of documents, exponentially distributed from 16 up to 8 x the mean, that make up this many tokens."""
    found: list[int] = []
    left = tokens
    while left:
        length = min(left, 8 * mean, 16 + int(generator.exponential(mean - 16)))
        found.append(length)
        left -= length
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLengths:
    """Tokens of a prompt, and of the chosen and the rejected answer to it."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def sides(self) -> tuple[int, int]:
        """Tokens of both conversations."""
        return self.prompt + self.chosen, self.prompt + self.rejected


def pair_lengths(generator: np.random.Generator, mean: int, most: int) -> PairLengths:
    """A pair whose sides have `mean` tokens on average, three tenths of it the prompt, and together at most `most`."""
    while True:
        parts = [8 + int(generator.exponential(share * mean - 8)) for share in (0.3, 0.7, 0.7)]
        pair = PairLengths(prompt=parts[0], chosen=parts[1], rejected=parts[2])
        if sum(pair.sides) <= most:
            return pair


def write_pairs(folder: Path, setting: Setting, *, rows: int) -> None:
    """A data set of random preference pairs, packed as raw2ids packs them, of at least so many rows."""
    from jllm.data.dataset.manifest import PREFERENCE, Manifest, entry_of_written, write_manifest
    from jllm.data.dataset.shards import ShardWriter
    from jllm.data.packing.best_fit import BestFitPacker
    from jllm.data.packing.documents import Documents

    assert setting.mean_document is not None
    generator = np.random.default_rng(0)
    lengths: list[PairLengths] = []
    while sum(sum(each.sides) for each in lengths) < 1.02 * rows * setting.length:
        lengths.append(pair_lengths(generator, setting.mean_document, setting.length))
    sides = np.array([side for each in lengths for side in each.sides], dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(sides)])
    ids = generator.integers(0, setting.vocabulary, offsets[-1]).astype(np.int32)
    labels = ids.copy()
    for number, each in enumerate(lengths):
        for start in offsets[2 * number : 2 * number + 2]:
            labels[start : start + each.prompt] = -100
    packer = BestFitPacker(setting.length, labels=True, pairs=True)
    packer.feed(Documents(ids=ids, offsets=offsets, labels=labels).in_pairs())
    path = folder / "set-00000/set-00000-00000.zstd.parquet"
    with ShardWriter(path, columns=packer.columns) as writer:
        for batch in packer.finish():
            writer.write(batch)
    entry = entry_of_written(path, folder, writer.statistics)
    write_manifest(folder, Manifest(command="benchmark", options={}, files=(entry,), kind=PREFERENCE))


def attended_length(folder: Path) -> float:
    """Of the documents of a set, the squared lengths over the lengths: S of `flops_per_token`."""
    from jllm.data.dataset.manifest import open_data_set
    from jllm.data.dataset.reader import ShardReader

    lengths = [
        np.diff(bounds)
        for path in open_data_set(folder).paths
        for batch in ShardReader(path)
        for bounds in batch.column("cu_seqlens").to_pylist()
    ]
    found = np.concatenate(lengths).astype(np.float64)
    return float((found**2).sum() / found.sum())


def write_data(folder: Path, setting: Setting, *, rows: int) -> None:
    """A data set of random ids: whole rows, or documents packed into them."""
    import pyarrow as pa

    from jllm.data.dataset.manifest import Manifest, entry_of_written, write_manifest
    from jllm.data.dataset.shards import CU_SEQLENS, INPUT_IDS, ShardWriter, schema, to_list_array

    generator, width = np.random.default_rng(0), setting.length + (setting.mean_document is None)
    values = generator.integers(0, setting.vocabulary, rows * width).astype(np.int32)
    columns, arrays = [INPUT_IDS], [to_list_array(values, np.arange(0, len(values) + 1, width, dtype=np.int64))]
    if setting.mean_document is not None:
        bounds = [np.cumsum([0, *documents(generator, width, setting.mean_document)]) for _ in range(rows)]
        edges = np.cumsum([0, *map(len, bounds)]).astype(np.int64)
        columns.append(CU_SEQLENS)
        arrays.append(to_list_array(np.concatenate(bounds).astype(np.int32), edges))
    path = folder / "set-00000/set-00000-00000.zstd.parquet"
    with ShardWriter(path, columns=columns) as writer:
        writer.write(pa.RecordBatch.from_arrays(arrays, schema=schema(columns)))
    entry = entry_of_written(path, folder, writer.statistics)
    write_manifest(folder, Manifest(command="benchmark", options={}, files=(entry,)))
