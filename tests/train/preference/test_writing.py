"""A set with references: the numbers of plain transformers, whatever the layout and however often it is killed; and
nothing else is taken for it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.dataset.columns import REF_LABELS, REF_LOGPS
from jllm.data.dataset.describe import verify
from jllm.data.dataset.manifest import open_data_set
from jllm.data.dataset.reader import ShardReader
from jllm.data.packing.pair_rows import row_checksum
from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.preference.writing import WORK_NAME
from jllm.train.trainer import run
from tests.data.pairs import pairs_of_row, random_pairs, write_pairs
from tests.data.raw2ids_runs import tree
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, train_rank, train_ranks
from tests.fixtures import random_rows, tiny_llama, write_rows

SIZE = int(os.environ.get("JLLM_TEST_SIZE", "1"))


@pytest.fixture(scope="module")
def ranks() -> Callable[[int], Ranks]:
    return Ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("references")
    tiny_llama(folder / "model", tied=False)
    write_pairs(folder / "data", random_pairs(60, vocab=97), length=60, per_file=3)
    assert Ranks(1).run(train_rank, writing(folder, folder / "ref")) == [None]
    return folder


def writing(folder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return options_of(folder, {"pipe_parallel_size": 1, "write_ref_logps": out}, **more)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for path in open_data_set(folder).paths for batch in ShardReader(path) for row in batch.to_pylist()]


def test_the_numbers_are_those_of_plain_transformers(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.distributed.pairs_reference import side_logps

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    source, made = rows_of(folder / "data"), rows_of(folder / "ref")
    assert len(source) > 10
    for before, after in zip(source, made, strict=True):
        with torch.no_grad():
            expected, _ = side_logps(model, pairs_of_row(before))
        np.testing.assert_allclose(after[REF_LOGPS.name], expected.flatten().numpy(), rtol=2e-6)
        sums = [np.array(before[name], np.int32) for name in ("input_ids", "labels", "cu_seqlens")]
        assert after[REF_LABELS.name] == row_checksum(*sums)
        assert {name: after[name] for name in before} == before


def test_the_manifest_says_what_made_them(folder: Path) -> None:
    data = open_data_set(folder / "ref")
    reference = data.manifest.reference
    assert reference is not None
    assert reference["model"] == "model"
    assert reference["precision"] == "fp32"
    assert {len(reference[name]) for name in ("weights", "labels")} == {64}
    assert data.manifest.kind == "preference"
    assert set(data.manifest.further.types) == {REF_LOGPS.name, REF_LABELS.name}
    assert [each.path for each in data.manifest.files] == [
        each.path for each in open_data_set(folder / "data").manifest.files
    ]
    assert not verify(data)
    assert not (folder / "ref" / WORK_NAME).exists()


SHARED = {"sequence_parallel_size": 2, "per_device_train_batch_size": 2}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "stages": {"pipe_parallel_size": 2},
        "slices": {"model_parallel_size": 2},
        "ulysses": {**SHARED, "sequence_parallel_mode": "ulysses"},
        "balanced": {**SHARED, "sequence_parallel_mode": "balanced", "fused_loss": "on"},
    },
    4: {
        "pipelines of stages": {"pipe_parallel_size": 2},
        "runs of slices": {**SHARED, "model_parallel_size": 2},
        "stages of runs": {**SHARED, "pipe_parallel_size": 2, "column_major_topology": False},
        "pipelines of slices": {"model_parallel_size": 2},
    },
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_any_layout(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path, world: int) -> None:
    """The numbers are those of one process, and so is what the manifest says of the model and its kernel."""
    runs = [writing(folder, tmp_path / name, **more) for name, more in LAYOUTS[world].items()]
    assert ranks(world).run(train_ranks, runs) == [[None] * len(runs)] * world
    made_by_one = open_data_set(folder / "ref").manifest.reference
    for name in LAYOUTS[world]:
        for one, other in zip(rows_of(folder / "ref"), rows_of(tmp_path / name), strict=True):
            found, expected = other.pop(REF_LOGPS.name), one.pop(REF_LOGPS.name)
            np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
            assert one == other
        assert open_data_set(tmp_path / name).manifest.reference == made_by_one


def test_kills_leave_no_trace(ranks: Callable[[int], Ranks], tmp_path: Path, folder: Path) -> None:
    """Killed at any moment and run again, the set is the same to the byte; a finished one is found so."""
    random = np.random.default_rng(3)
    out, kills, halves = tmp_path / "ref", 0, 0
    options = writing(folder, out)
    while kills < 2 + 3 * (SIZE - 1):
        processes = Ranks(1)
        processes.start(train_rank, options)
        deadline = time.monotonic() + 60
        wanted = int(random.integers(0, 3)) + len(list(out.rglob("*.parquet")))
        while len(list(out.rglob("set-*/*.parquet"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(float(random.random()) * 0.05)
        processes.close()
        kills += 1
        halves += (out / WORK_NAME / "state.json").is_file()
        if (out / "_manifest.json").is_file():
            assert tree(out) == tree(folder / "ref")
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    assert ranks(1).run(train_rank, options) == [None]
    assert tree(out) == tree(folder / "ref")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert ranks(1).run(train_rank, options) == [None]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def refusal(options: dict[str, Any]) -> str:
    """What a dry run of these options says; a run calls the same functions."""
    with pytest.raises(UserError) as error:
        run(TrainConfig(**options, dry_run=True))
    return str(error.value)


def test_what_the_folder_may_hold(folder: Path, tmp_path: Path, ranks: Callable[[int], Ranks]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    [said] = ranks(1).run(train_rank, writing(folder, tmp_path / "full"))
    assert "is not empty" in said
    tiny_llama(tmp_path / "model", tied=False, seed=1)
    [said] = ranks(1).run(train_rank, writing(folder, folder / "ref", model=tmp_path / "model"))
    assert "holds another set (weights " in said
    assert "lies in --train_data" in refusal(writing(folder, folder / "data" / "ref"))
    plain = write_rows(tmp_path / "plain", random_rows(9))
    chat = write_rows(tmp_path / "chat", random_rows(9))
    manifest = json.loads((chat / "_manifest.json").read_text())
    (chat / "_manifest.json").write_text(json.dumps({**manifest, "kind": "chat"}))
    assert "takes preference pairs, and" in refusal(writing(folder, tmp_path / "x", train_data=(str(chat),)))
    [said] = ranks(1).run(train_rank, writing(folder, tmp_path / "x", train_data=(str(plain),)))
    assert "not a row of preference pairs" in said
    with pytest.raises(UserError, match="drop --max_steps"):
        TrainConfig(**writing(folder, tmp_path / "x", max_steps=3))
    with pytest.raises(UserError, match="one data set at a time"):
        TrainConfig(**writing(folder, tmp_path / "x", train_data=("a", "b")))


def test_a_dry_run_says_what_would_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(TrainConfig(**writing(folder, folder / "new"), dry_run=True))
    said = capsys.readouterr().out
    assert f"writes {folder / 'new'}: " in said
    assert not (folder / "new").exists()
