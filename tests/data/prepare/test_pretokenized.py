"""Input that holds ids already: taken as it is, or refused."""

import itertools
import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.manifest import read_manifest
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import CU_SEQLENS, LABELS
from jllm.data.prepare import pretokenized
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.sources.inputs import resolve
from jllm.errors import UserError
from tests.data.raw2ids_runs import raw2ids, reference_stream, rows_of, tree, write_jsonl

EXAMPLES = max(20, int(60 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))


def encoder() -> pretokenized.IdsEncoder:
    """An encoder of sources of ids alone, for 400 ids; of its tokenizer it asks the size."""
    facts = SimpleNamespace(vocab_size=400, name="toy")
    return pretokenized.IdsEncoder(
        facts=facts,  # type: ignore[arg-type]
        names=("x",),
        longest=None,
        refuse_longer=False,
        labels=True,
        masked_ids=frozenset(),
        others=None,
    )


def rows(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 400, size=random.integers(1, longest)).tolist() for _ in range(count)]


def write(path: Path, ids: list[Any], labels: list[Any] | None = None, kind: pa.DataType | None = None) -> Path:
    kind = kind or pa.list_(pa.int64())
    columns = {"token_type_ids": pa.array([[1]] * len(ids)), "input_ids": pa.array(ids, kind)}
    if labels is not None:
        columns["labels"] = pa.array(labels, kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=17)
    return path


def bad_of(folder: Path) -> dict[str, int]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return {kind: found["count"] for kind, found in manifest.extra["bad_records"].items()}


@pytest.mark.parametrize("kind", [["-t", "pretrain"], ["-t", "ft"]], ids=["pretrain", "ft"])
def test_rows_are_taken_as_they_are(tmp_path: Path, byte_tokenizer: Path, kind: list[str]) -> None:
    plain, labelled = rows(50), rows(40, seed=1)
    labels = [[index if i % 3 else -100 for i, index in enumerate(row)] for row in labelled]
    write(tmp_path / "in" / "part-00000-a.parquet", plain, kind=pa.large_list(pa.int32()))
    write(tmp_path / "in" / "part-00001-a.parquet", labelled, labels)
    (tmp_path / "in" / "_SUCCESS").touch()
    arguments = ["-i", tmp_path / "in", "--tokenizer", byte_tokenizer, *kind, "--max_len", 64]
    raw2ids(*arguments, "-o", tmp_path / "out")
    assert rows_of(tmp_path / "out") == plain + labelled
    assert rows_of(tmp_path / "out", LABELS) == plain + labels
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.tokenizer is not None
    assert bad_of(tmp_path / "out") == {}
    assert [source["documents"] for source in manifest.sources] == [50, 40]
    raw2ids(*arguments, "-o", tmp_path / "packed", "--packing", "best_fit")
    pieces = [
        row[a:b]
        for row, bounds in zip(rows_of(tmp_path / "packed"), rows_of(tmp_path / "packed", CU_SEQLENS), strict=True)
        for a, b in itertools.pairwise(bounds)
    ]
    assert sorted(pieces) == sorted(plain + labelled)


def test_what_is_wrong_costs_itself(tmp_path: Path, byte_tokenizer: Path) -> None:
    ids: list[Any] = [*rows(1000), [7] * 101, [8] * 100, None, [], [1, 2, 3], [1, 2, 3], [4, 5]]
    labels: list[Any] = [*ids[:-3], [1, 2], [2, 3, 3], [-100, 5]]
    source = write(tmp_path / "in.parquet", ids, labels)
    arguments = ["-i", source, "--tokenizer", byte_tokenizer, "-t", "pretrain", "--max_len", 100]
    raw2ids(*arguments, "-o", tmp_path / "out", "--cores", 1)
    assert rows_of(tmp_path / "out") == [*rows(1000), [8] * 100, [4, 5]]
    assert rows_of(tmp_path / "out", LABELS)[-1] == [-100, 5]
    assert bad_of(tmp_path / "out") == {"too long": 1, "missing field": 1, "empty document": 1, "wrong labels": 2}
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["bad_records"]["too long"]["examples"] == ["in.parquet:1001: too long: more than 100 ids"]
    raw2ids(*arguments, "-o", tmp_path / "again", "--cores", 2)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    raw2ids(*arguments, "-o", tmp_path / "stacked", "--stack")
    assert "too long" not in bad_of(tmp_path / "stacked"), "a stream has no long documents"
    stream = [index for k, row in enumerate(rows_of(tmp_path / "stacked")) for index in row[k > 0 :]]
    assert stream == [index for row in [*rows(1000), [7] * 101, [8] * 100, [4, 5]] for index in row]


def test_padding_is_left_out(tmp_path: Path, byte_tokenizer: Path) -> None:
    table = {
        "labels": [[-100, 2, 3, -100, -100], [-100, -100, 5], [6, 7], [-100, -100], [8]],
        "input_ids": [[1, 2, 3, 0, 0], [0, 4, 5], [6, 7], [0, 0], [8, 9]],
        "attention_mask": [[1, 1, 1, 0, 0], [0, 1, 1], [1, 1], [0, 0], [1, 1]],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    words = ["-i", tmp_path / "in.parquet", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "--max_len", 3]
    raw2ids(*words)
    assert rows_of(tmp_path / "out") == [[1, 2, 3], [4, 5], [6, 7]]
    assert rows_of(tmp_path / "out", LABELS) == [[-100, 2, 3], [-100, 5], [6, 7]]
    assert bad_of(tmp_path / "out") == {"empty document": 1, "wrong labels": 1}


def test_ids_beside_texts(tmp_path: Path, byte_tokenizer: Path) -> None:
    texts = ["one", "two words"]
    write(tmp_path / "in" / "b.parquet", [[1, 2], [3]])
    write_jsonl(tmp_path / "in" / "a.jsonl", texts)
    raw2ids("-i", tmp_path / "in", "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain")
    assert rows_of(tmp_path / "out") == [*reference_stream(byte_tokenizer, texts), [1, 2], [3]]


@pytest.mark.parametrize(
    ("columns", "arguments", "said"),
    [
        ({"input_ids": [[1, 2], [3, 100_000]]}, [], "row 2 has the id 100000"),
        ({"input_ids": [[-1]]}, [], "row 1 has the id -1"),
        ({"input_ids": [[1]], "cu_seqlens": [[0, 1]]}, [], "jllm manifest"),
        ({"input_ids": [[1]], "prompt_mask": [[1]]}, [], "column prompt_mask says what is trained on"),
        ({"input_ids": [[1]], "mask": [[True]]}, [], "column mask says what is trained on"),
        ({"input_ids": [[1]], "masked": [False]}, [], "column masked says what is trained on"),
        ({"input_ids": [[1], [2]], "loss_mask": [[1], [None]]}, [], "column loss_mask: 1 elements are null"),
        ({"input_ids": ["text"]}, [], "input_ids is string"),
        ({"input_ids": [[1]]}, ["--doc_suffix", "[1]"], "--doc_suffix"),
        ({"input_ids": [[1]]}, ["--text_field", "body", "--input_format", "parquet"], None),
        ({"text": ["x"]}, ["--input_format", "ids"], "no column input_ids"),
        ({"text": ["x"], "input_ids": [[1]]}, ["--input_format", "ids"], None),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, byte_tokenizer: Path, columns: dict[str, Any], arguments: list[str], said: str | None
) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table(columns), source)
    words = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", *arguments]
    result = raw2ids(*words, check=False)
    if said is None:
        assert rows_of(tmp_path / "out") == [[1]]
        return
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


MARKS = ["completion_mask", "assistant_masks", "loss_mask", "lossMask", "assistant_tokens_mask", "loss_weights"]


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_no_token_whose_mark_says_no_is_trained(data: st.DataObject) -> None:
    """Labels and marks of every kind together: trained is what all of them train, and all of it."""
    ids = data.draw(st.lists(st.lists(st.integers(0, 399), min_size=1, max_size=9), min_size=1, max_size=9))
    expected = [[True] * len(row) for row in ids]
    columns: dict[str, pa.Array] = {"input_ids": pa.array(ids, pa.list_(pa.int64()))}

    def flags(name: str) -> list[list[bool]]:
        drawn = [[data.draw(st.booleans(), label=name) for _ in row] for row in ids]
        for row, more in zip(expected, drawn, strict=True):
            row[:] = [a and b for a, b in zip(row, more, strict=True)]
        return drawn

    if data.draw(st.booleans()):
        labels = [
            [index if flag else -100 for index, flag in zip(row, marks, strict=True)]
            for row, marks in zip(ids, flags("labels"), strict=True)
        ]
        columns["labels"] = pa.array(labels, pa.list_(pa.int64()))
    kinds = st.sampled_from([pa.bool_(), pa.int8(), pa.uint8(), pa.int64(), pa.float32(), pa.float64()])
    for name in data.draw(st.lists(st.sampled_from(MARKS), unique=True, max_size=3)):
        columns[name] = pa.array(flags(name), pa.list_(pa.bool_())).cast(pa.list_(data.draw(kinds)))
    for name in data.draw(st.lists(st.sampled_from(["train", "weight", "loss_weight"]), unique=True, max_size=1)):
        of_rows = [data.draw(st.booleans(), label=name) for _ in ids]
        expected = [[each and flag for each in row] for row, flag in zip(expected, of_rows, strict=True)]
        columns[name] = pa.array(of_rows).cast(data.draw(kinds))
    table = pa.table(columns)
    marks = {field.name for field in table.schema if field.name not in pretokenized.READ}
    documents, bad = encoder()._documents(table, 1, "-i x")
    assert not bad
    assert documents.labels is not None
    got = [documents.labels[a:b].tolist() for a, b in itertools.pairwise(documents.offsets.tolist())]
    assert got == [
        [index if flag else -100 for index, flag in zip(row, wanted, strict=True)]
        for row, wanted in zip(ids, expected, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.parquet")
        pq.write_table(table, path)
        found = pretokenized.recognised(Raw2IdsConfig(input=(folder,), tokenizer="x"), resolve([folder]))
        assert set(found.columns(0)) == {*pretokenized.READ, *marks}
        assert found.labels == bool(marks or "labels" in columns)
        if marks:  # where rows are read in place, nobody reads marks
            with pytest.raises(UserError, match=f"column ({'|'.join(marks)}) says what is trained on"):
                ShardReader(path)


def test_marks_in_a_run(tmp_path: Path, byte_tokenizer: Path) -> None:
    table = {
        "input_ids": [[1, 2, 3], [4, 5], [6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1], [1, 1], [1, 1, 0]],
        "completion_mask": [[0, 1.0, 1], [0, 0.5], [1], [0, 1, 1]],
        "train": [True, True, True, False],
    }
    pq.write_table(pa.table(table), tmp_path / "in.parquet")
    words = ["-i", tmp_path / "in.parquet", "--tokenizer", byte_tokenizer, "--max_len", 8]
    for kind in ("ft", "pretrain"):
        raw2ids(*words, "-o", tmp_path / kind, "-t", kind)
        assert rows_of(tmp_path / kind, LABELS) == [[-100, 2, 3], [-100, -100]]
        assert bad_of(tmp_path / kind) == {"wrong completion_mask": 2}
