"""Labels that are none are refused with file and row, and columns that say what is trained are never passed over."""

import itertools
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.columns import INPUT_IDS, LABELS
from jllm.data.dataset.describe import describe_file
from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.training_marks import marks_trained, says_what_is_trained
from jllm.errors import UserError
from jllm.train.data.rows import ShardIndex, read_rows
from tests.data.foreign_sets import ids, write
from tests.fixtures import write_rows

EXAMPLES = max(20, int(60 * float(os.environ.get("JLLM_TEST_SIZE", "1"))))
LISTS = [pa.list_(pa.int32()), pa.large_list(pa.int64()), pa.list_(pa.int16())]


def read_by_trainer(folder: Path) -> list[list[int]]:
    index = ShardIndex(open_data_set(folder))
    order = index.order(seed=1, epoch=0, shuffle=True)
    return [row.ids.tolist() for row in read_rows(index, order, 0, ahead=False)]


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_one_wrong_label_is_found_by_all(data: st.DataObject) -> None:
    """In a file of any writer, with row groups of any size: the manifest and the trainer name the file and the row."""
    rows = data.draw(st.lists(st.lists(st.integers(1, 99), min_size=0, max_size=6), min_size=1, max_size=12))
    labels = [[each if data.draw(st.booleans()) else -100 for each in row] for row in rows]
    wrong = data.draw(st.sampled_from([None, *(number for number, row in enumerate(rows) if len(row) > 1)]))
    if wrong is not None:
        how = data.draw(st.sampled_from(["another", "shorter", "longer"]))
        if how == "another":
            place = data.draw(st.integers(1, len(rows[wrong]) - 1))
            labels[wrong][place] = data.draw(st.sampled_from([-1, 0, 100, rows[wrong][place] + 1, -101]))
        else:
            labels[wrong] = labels[wrong][:-1] if how == "shorter" else [*labels[wrong], -100]
    kind = data.draw(st.sampled_from(LISTS))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "a.parquet")
        table = pa.table({INPUT_IDS: pa.array(rows, kind), LABELS: pa.array(labels, kind)})
        pq.write_table(table, path, row_group_size=data.draw(st.integers(1, 12)))
        for read in (lambda: read_by_trainer(Path(name)), lambda: describe_file(path, Path(name))):
            if wrong is None:
                read()
                continue
            with pytest.raises(UserError, match=rf"{path}: row {wrong} has (the label|\d labels)"):
                read()


def test_labels_of_our_own_files_are_checked_too(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [{"input_ids": [1, 2, 3], "labels": [1, -100, 4]}])
    for columns in (None, (INPUT_IDS, LABELS)):
        (path,) = open_data_set(tmp_path / "a").paths
        with pytest.raises(UserError, match="row 0 has the label 4 for the id 3"):
            ShardReader(path, columns=columns).read_group(0)


def test_the_first_label_of_a_row_is_predicted_by_nobody(tmp_path: Path) -> None:
    """The trainer reads on; a manifest, which says that labels were checked, is not made."""
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids([[], [1, 2]]), LABELS: ids([[], [7, 2]])})
    assert sorted(read_by_trainer(tmp_path)) == [[], [1, 2]]
    with pytest.raises(UserError, match="row 1 has the label 7 for the id 1"):
        describe_file(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "kind", "says", "clear"),
    [
        *(
            (name, pa.list_(pa.int8()), True, True)
            for name in ("completion_mask", "assistant_masks", "loss_mask", "response_mask", "labelMask", "loss_scale")
        ),
        *((name, pa.list_(pa.float32()), True, True) for name in ("weights", "token_weights", "loss-weights")),
        *((name, pa.list_(pa.bool_()), True, False) for name in ("prompt_mask", "mask", "masked", "is_completion")),
        *((name, pa.bool_(), True, True) for name in ("train", "weight", "loss", "sample_weight")),
        ("loss", pa.float64(), False, False),
        ("train", pa.string(), False, False),
        *((name, pa.list_(pa.int32()), False, False) for name in ("control_class", "ref_logps", "token_type_ids")),
        *((name, pa.list_(pa.int32()), False, False) for name in ("special_tokens_mask", "attention_mask", "position")),
    ],
)
def test_names(name: str, kind: pa.DataType, says: bool, clear: bool) -> None:
    field = pa.field(name, kind)
    assert (says_what_is_trained(field), marks_trained(field)) == (says, clear)


@pytest.mark.parametrize(
    ("mask", "more", "refused"),
    [
        ([1, 1], {}, False),
        ([1, 0], {}, True),
        ([1, 0], {LABELS: ids([[1, -100]])}, False),
        ([1, 0], {"cu_seqlens": ids([[0, 1]])}, False),
    ],
)
def test_padding_in_place(tmp_path: Path, mask: list[int], more: dict[str, pa.Array], refused: bool) -> None:
    """Padding that only an attention mask tells from tokens would be trained on."""
    path = write(tmp_path / "a.parquet", {INPUT_IDS: ids([[1, 2]]), "attention_mask": ids([mask]), **more})
    if refused:
        with pytest.raises(UserError, match="column attention_mask is 0 where there is padding"):
            ShardReader(path)
    else:
        assert len(list(itertools.chain(ShardReader(path)))) == 1
