"""Options turned into encoders and packers: what they do to the rows."""

import json
from pathlib import Path

import pytest

from jllm.data.dataset.manifest import read_manifest
from jllm.data.dataset.shards import IGNORE_INDEX, LABELS
from tests.data.raw2ids_runs import documents, raw2ids, reference_stream, rows_of, write_jsonl


@pytest.mark.parametrize(
    "rows", [["--stack", "--max_len", 33], ["--packing", "best_fit"], []], ids=["stack", "best_fit", "alone"]
)
def test_masked_are_the_special_tokens_and_no_others(tmp_path: Path, byte_tokenizer: Path, rows: list[object]) -> None:
    texts = [f"{text}<|endoftext|> more<|im_start|><think> x" for text in documents(30)]
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--parse_special", *rows]
    raw2ids(*arguments, "-o", tmp_path / "plain")
    raw2ids(*arguments, "-o", tmp_path / "masked", "--mask_tokens")
    added = json.loads((byte_tokenizer / "tokenizer.json").read_text())["added_tokens"]
    special = {token["id"] for token in added if token["special"]}
    assert special < {token["id"] for token in added}, "added tokens that are not special stay trained"
    plain, ids, labels = rows_of(tmp_path / "plain"), rows_of(tmp_path / "masked"), rows_of(tmp_path / "masked", LABELS)
    assert ids == plain
    assert labels == [[IGNORE_INDEX if index in special else index for index in row] for row in ids]
    masked = sum(label == IGNORE_INDEX for row in labels for label in row)
    assert masked >= 3 * len(texts)
    manifests = [read_manifest(tmp_path / name) for name in ("plain", "masked")]
    trained = [manifest.total("trained_tokens") or 0 for manifest in manifests if manifest is not None]
    shared = len(ids) if "--stack" in rows else 0  # a row's first token is no target, and may be masked
    assert masked - shared <= trained[0] - trained[1] <= masked


@pytest.mark.parametrize("length", [64, 65])
def test_half_the_stride_doubles_the_tokens(tmp_path: Path, byte_tokenizer: Path, length: int) -> None:
    texts = [" ".join(documents(60, longest=40)), "short"]
    source = write_jsonl(tmp_path / "some.jsonl", texts)
    long, short = reference_stream(byte_tokenizer, texts)
    stride = length // 2
    words = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--max_len", length, "--stride", stride]
    raw2ids(*words, "-o", tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert rows.pop() == short
    assert rows == [long[begin : begin + length] for begin in range(0, len(long) - length + stride, stride)]
    total = sum(map(len, rows))
    assert abs(total - len(long) * length / stride) <= length + 1
    assert total > 1.8 * len(long)
