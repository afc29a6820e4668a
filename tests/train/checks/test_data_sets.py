"""What a model cannot be trained on is refused by the manifest, or at the row; lengths that are odd are a warning."""

from pathlib import Path
from typing import Any

import pytest
import torch

from jllm.data.dataset.manifest import open_data_set
from jllm.errors import UserError
from jllm.models.weights.source import ModelInfo
from jllm.train.checks.data_sets import check_batch, check_data_sets, has_targets, warnings_about_rows
from jllm.train.config import TrainConfig, weighted_folders
from tests.fixtures import write_rows

MODEL = ModelInfo(
    model_type="x", vocab_size=50, num_layers=2, dtype=torch.float32, tied=False, positions_depend_on_length=False
)


def check(folder: Path, *, weight: str = "", positions: int | None = None, **more: Any) -> None:
    config = TrainConfig(model=Path("model"), train_data=(f"{folder}{weight}",), **more)
    given = weighted_folders(config)
    model = ModelInfo(**{**vars(MODEL), "learned_positions": positions})
    check_data_sets(given, [open_data_set(each.folder) for each in given], config, model)


def test_lengths(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", [{"input_ids": [1] * 9}, {"input_ids": [1] * 4}])
    check(folder, positions=8)
    with pytest.raises(UserError, match=r"rows of 9 tokens, and the model has learned positions for 7; .* --max_len 8"):
        check(folder, positions=7)
    with pytest.raises(UserError, match=r"--seq_len 7: .* has rows of 9 tokens; give --seq_len 8"):
        check(folder, seq_len=7)
    # Padding counts, but only as far as the model has positions.
    with pytest.raises(UserError, match=r"--batch_size_tokens 63: .* which are 64 with their padding"):
        check(folder, batch_size_tokens=63)
    check(folder, batch_size_tokens=8, positions=8)


def test_ids_and_weights(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "set", [{"input_ids": [1, 49]}] * 4)
    check(folder)
    check(folder, weight="=0.25")
    with pytest.raises(UserError, match=r"=0.2: of 4 rows that leaves none; give at least 0.25"):
        check(folder, weight="=0.2")
    with pytest.raises(UserError, match="token id 50 in the data: the model has ids from 0 to 49"):
        check(write_rows(tmp_path / "beyond", [{"input_ids": [1, 50]}]))


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize(
    ("rows", "trained"),
    [
        ([{"input_ids": [1, 2]}], True),
        ([{"input_ids": [1]}] * 3, False),
        ([{"input_ids": [1, 2], "labels": [1, -100]}] * 3, False),
        ([{"input_ids": [1, 2], "labels": [1, -100]}] * 3 + [{"input_ids": [1, 2], "labels": [-100, 2]}], True),
        ([{"input_ids": [1, 2, 3], "cu_seqlens": [0, 1, 2, 3]}] * 3, False),
    ],
)
def test_something_is_trained_on(tmp_path: Path, rows: list[dict[str, Any]], trained: bool, manifest: bool) -> None:
    folder = write_rows(tmp_path / "set", rows, manifest=manifest, files=2)
    assert has_targets(open_data_set(folder)) == trained
    if not trained:
        with pytest.raises(UserError, match=f"no token of {folder} is a target"):
            check(folder)


def test_rotary_positions_are_a_warning(tmp_path: Path) -> None:
    sets = [open_data_set(write_rows(tmp_path / "set", [{"input_ids": [1] * 9}]))]
    for seen, count in ((7, 1), (8, 0), (None, 0)):
        found = warnings_about_rows(sets, ModelInfo(**{**vars(MODEL), "rotary_positions": seen}))
        assert len(found) == count
        assert all("rows of 9 tokens, and the model has seen positions up to 7" in line for line in found)


def test_batches_beyond_the_data() -> None:
    def config(**more: Any) -> TrainConfig:
        return TrainConfig(model=Path("model"), train_data=("set",), **more)

    check_batch(config(), rows=8, step_rows=8, longest_row=None)
    with pytest.raises(UserError, match=r"a step of 9 rows .* is more than an epoch, which has 8"):
        check_batch(config(), rows=8, step_rows=9, longest_row=None)
    by_tokens = config(batch_size_tokens=513)
    check_batch(by_tokens, rows=9, step_rows=1, longest_row=60)
    check_batch(by_tokens, rows=8, step_rows=1, longest_row=None)
    with pytest.raises(UserError, match="--batch_size_tokens 513: the 8 rows of an epoch have at most 60 tokens each"):
        check_batch(by_tokens, rows=8, step_rows=1, longest_row=60)
    many = config(batch_size_tokens=64, gradient_accumulation_steps=9)
    with pytest.raises(UserError, match="--gradient_accumulation_steps 9: an epoch has 8 rows"):
        check_batch(many, rows=8, step_rows=1, longest_row=60)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (None, "has no column control_class; make its classes with raw2ids --control_class"),
        ([0, 0, 0], "is 0, where adapters are off, so nothing would be trained"),
        ([0, 2, 1], "has control class 2; classes are 1, -1 and 0"),
        ([-3, 0, 1], "has control class -3; classes are 1, -1 and 0"),
        ([0, 0, 1], None),
        ([-1, 0, 0], None),
    ],
)
def test_control_classes(tmp_path: Path, classes: list[int] | None, message: str | None) -> None:
    """By the footers; in a dry run too."""
    row = {"input_ids": [1, 2, 3], **({} if classes is None else {"control_class": classes})}
    folder = write_rows(tmp_path / "set", [row, row], files=2)
    if message is None:
        check(folder, control_adapter_rank=4)
        return
    with pytest.raises(UserError, match=r"^--control_adapter_rank: ") as refused:
        check(folder, control_adapter_rank=4)
    assert message in str(refused.value)
    check(folder)
