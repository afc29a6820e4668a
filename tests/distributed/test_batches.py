"""How rows become steps: accumulation, token budgets, several sets, parts on nodes, packing. Losses show the rows."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.dataset.manifest import MANIFEST_NAME, open_data_set
from jllm.data.packing.best_fit import best_fit
from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.format import write_index
from jllm.train.data.batching import NEWEST_RULE
from jllm.train.data.rows import ShardIndex, read_rows
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, rows_in_order, train_reference
from tests.distributed.runs import records, train_rank
from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows

REFERENCE = {"optimizer": "sgd", "learning_rate": 0.05, "gradient_clipping": 0.7, "seed": 7}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    tiny_llama(folder / "model", tied=False)
    write_rows(folder / "data", random_rows(20, longest=120, labels=True, packed=True), files=2)
    return folder


def options_of(folder: Path, log: Path, **more: Any) -> dict[str, Any]:
    return {
        **REFERENCE,
        "model": folder / "model",
        "train_data": (str(folder / "data"),),
        "precision": "fp32",
        "lr_scheduler_type": "constant",
        "partition_method": "uniform",
        "log_dir": log,
        **more,
    }


def losses_of(log: Path) -> list[float]:
    return [record["loss"] for record in records(log)]


@pytest.mark.parametrize(("world_size", "pipe"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_accumulation_changes_nothing(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, world_size: int, pipe: int
) -> None:
    """4 micro-batches of 1 row are 1 of 4 rows, though rows have very different numbers of trained tokens."""
    for micro_batch, accumulation in ((1, 4), (4, 1)):
        more = {
            "pipe_parallel_size": pipe,
            "per_device_train_batch_size": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 3,
        }
        log = tmp_path / f"{micro_batch}x{accumulation}"
        assert ranks(world_size).run(train_rank, options_of(folder, log, **more)) == [None] * world_size
    one, other = records(tmp_path / "1x4"), records(tmp_path / "4x1")
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([r[name] for r in one], [r[name] for r in other], atol=1e-5, rtol=1e-5)
    batches = batches_in_order(folder / "data", steps=3, global_batch=4 * world_size // pipe, seed=7)
    losses, _, _ = train_reference(folder / "model", batches, options=REFERENCE)
    np.testing.assert_allclose([r["loss"] for r in one], losses, atol=1e-5)


def by_length(lengths: list[int], budget: int) -> list[list[int]]:
    """Rows in micro-batches of at most `budget` padded tokens, sorted by length."""
    found: list[list[int]] = []
    width = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if found and (len(found[-1]) + 1) * width <= budget:
            found[-1].append(number)
        else:
            found.append([number])
            width = -(-(lengths[number] - 1) // 64) * 64
    return found


def documents_of(row: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The documents of a row, each as a row of its own."""
    return [
        {name: row[name][start:end] for name in ("input_ids", "labels")}
        for start, end in pairwise(row["cu_seqlens"].tolist())
        if end - start > 1
    ]


@pytest.mark.parametrize("block_mask", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_token_budget(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path, world_size: int, block_mask: bool
) -> None:
    """Steps of 4 micro-batches of 256 tokens in a seeded order, however many pipelines share them.

    The rows are one window. With --block_mask they are joined; the reference trains on their documents one by one.
    """
    more = {
        "pipe_parallel_size": 2,
        "batch_size_tokens": 256,
        "gradient_accumulation_steps": 4 * 2 // world_size,
        "num_train_epochs": 2,
        "block_mask": block_mask,
    }
    assert ranks(world_size).run(train_rank, options_of(folder, tmp_path, **more)) == [None] * world_size
    index = ShardIndex(open_data_set(folder / "data"))
    batches: list[list[dict[str, np.ndarray]]] = []
    for epoch in range(2):
        rows = list(rows_in_order(folder / "data", seed=7, epoch=epoch))
        lengths = [len(row["input_ids"]) for row in rows]
        if block_mask:
            members = best_fit(lengths, 257)
            groups = by_length([sum(lengths[number] for number in each) for each in members], 256)
            groups = [[number for each in group for number in members[each]] for group in groups]
        else:
            groups = by_length(lengths, 256)
        drawn = index.order(seed=7, epoch=epoch, shuffle=True).generator(3, 0).permutation(len(groups))
        for start in range(0, len(groups), 4):
            batches.append([rows[number] for group in drawn[start : start + 4] for number in groups[group]])
    assert len({len(batch) for batch in batches}) > 1
    found = records(tmp_path)
    alone = [[document for row in batch for document in documents_of(row)] for batch in batches]
    losses, norms, _ = train_reference(folder / "model", alone if block_mask else batches, options=REFERENCE)
    np.testing.assert_allclose([r["loss"] for r in found], losses, atol=1e-5)
    np.testing.assert_allclose([r["grad_norm"] for r in found], norms, rtol=1e-4)
    assert found[-1]["consumed_rows"] == 40
    assert found[-1]["epoch"] == 2
    # The first step is padded, which makes no difference to what its micro-batches could hold.
    assert all(record["filled"] == record["tokens"] / (4 * 256) for record in found)
    assert max(record["filled"] for record in found) > (0.8 if block_mask else 0.6)


def test_a_run_goes_on_by_its_own_rule(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """A checkpoint without a rule is from when there was the first one: a step takes rows while they fit."""
    more: dict[str, Any] = {"batch_size_tokens": 256, "gradient_accumulation_steps": 2, "max_steps": 7}
    more |= {"checkpoint": tmp_path / "run", "steps_per_checkpoint": 2, "log_dir": None}
    options = options_of(folder, tmp_path, **more)
    assert ranks(1).run(train_rank, options) == [None]
    for step in (4, 6, 7):
        shutil.rmtree(tmp_path / f"run/step-{step:08d}")
    place = tmp_path / "run/step-00000002"
    index = json.loads((place / INDEX_NAME).read_text())
    assert index["config"].pop("batching_rule") == NEWEST_RULE
    write_index(place, index)
    rows = [row for epoch in range(4) for row in rows_in_order(folder / "data", seed=7, epoch=epoch)]
    at, expected = index["consumed_rows"], []
    for _ in range(5):
        end = at + 1
        while end % 20 and len(by_length([len(row["input_ids"]) for row in rows[at : end + 1]], 256)) <= 2:
            end += 1
        expected.append(end)
        at = end
    [answer] = ranks(1).run(train_rank, {**options, "resume_ckpt": "auto"})
    assert answer is None
    found = records(tmp_path / "run/log")
    by_newest = [record["consumed_rows"] for record in found]
    assert by_newest[2:] == expected
    last = json.loads((tmp_path / "run/step-00000007" / INDEX_NAME).read_text())
    assert last["config"]["batching_rule"] == 1
    index["config"]["batching_rule"] = 99
    write_index(place, index)
    [answer] = ranks(1).run(train_rank, {**options, "resume_ckpt": str(place)})
    assert answer is not None
    assert "is of a run that groups rows by rule 99, this version of jllm knows 1, 2; go on with" in answer


def longest_of_first_steps(runs: list[dict[str, Any]]) -> list[int | None]:
    """What the first step of each of these runs is padded to."""
    from jllm.train import setup
    from jllm.train.config import TrainConfig
    from jllm.train.data.open import open_training_data
    from jllm.train.dry_run import Alone
    from jllm.train.shape import resolve_shape

    found = []
    for config in (TrainConfig(**options) for options in runs):
        shape = resolve_shape(config, 1)
        data = open_training_data(config, shape, Alone(shape.mesh), setup.read_model_info(config))
        found.append(data.share.longest)
    return found


def test_which_first_steps_are_the_largest(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """All by the manifest, but where there is none, or where padding has a part in what is computed."""
    shutil.copytree(folder / "data", tmp_path / "bare")
    (tmp_path / "bare" / MANIFEST_NAME).unlink()
    shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    cases: list[dict[str, Any]] = [
        {},
        {"seq_len": 500},
        {"train_data": (str(tmp_path / "bare"),)},
        {"router_aux_loss_coef": 0.1},
        {"model": tmp_path / "model"},
    ]
    [found] = ranks(1).run(longest_of_first_steps, [options_of(folder, tmp_path / "log", **more) for more in cases])
    longest = open_data_set(folder / "data").manifest.longest_row
    assert longest is not None
    assert found == [longest - 1, longest - 1, None, None, None]


def test_token_budget_smaller_than_a_row(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    more = {"batch_size_tokens": 64, "max_steps": 9}
    [answer] = ranks(1).run(train_rank, options_of(folder, tmp_path, **more))
    assert answer is not None
    assert answer.startswith(f"--batch_size_tokens 64: {folder / 'data'} has rows of ")
    # Without a manifest nothing is known of it beforehand.
    shutil.copytree(folder / "data", tmp_path / "bare")
    (tmp_path / "bare" / MANIFEST_NAME).unlink()
    more["train_data"] = (str(tmp_path / "bare"),)
    [answer] = ranks(1).run(train_rank, options_of(folder, tmp_path, **more))
    assert answer is not None
    assert "--batch_size_tokens 64: a row has" in answer
    assert ".parquet: row group 0, row" in answer


def test_weighted_sets(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """An epoch has the rows of the first set once, and of the second twice and a half of them a third time."""
    other = write_rows(tmp_path / "other", random_rows(8, seed=5), files=2)
    more = {
        "train_data": (str(folder / "data"), f"{other}=2.5"),
        "gradient_accumulation_steps": 8,
        "num_train_epochs": 1,
    }
    [answer] = ranks(1).run(train_rank, options_of(folder, tmp_path / "log", **more))
    assert answer is None
    index = ShardIndex(open_data_set(folder / "data"), open_data_set(other), weights=[1, 2.5])
    order = index.order(seed=7, epoch=0, shuffle=True)
    rows = [
        {"input_ids": row.ids.astype(np.int64)}
        | ({"labels": row.labels.astype(np.int64)} if row.labels is not None else {})
        | ({"cu_seqlens": row.boundaries} if row.boundaries is not None else {})
        for row in read_rows(index, order, 0, ahead=False)
    ]
    assert len(rows) == 20 + 20
    batches = [rows[at : at + 8] for at in range(0, 40, 8)]
    losses, _, _ = train_reference(folder / "model", batches, options=REFERENCE)
    np.testing.assert_allclose(losses_of(tmp_path / "log"), losses, atol=1e-5)


def train_rank_on_node(options: dict[str, Any], folder: Path, ranks_of_a_node: int) -> str | None:
    """A rank of a run over nodes, each with a working folder of its own."""
    node, local = divmod(int(os.environ["RANK"]), ranks_of_a_node)
    os.environ["LOCAL_RANK"] = str(local)
    os.chdir(folder / f"node-{node}")
    return train_rank(options)


@pytest.fixture
def nodes(tmp_path: Path) -> Path:
    """Two nodes whose `data` are different parts, of 10 and 5 rows."""
    for node, rows in ((0, 10), (1, 5)):
        write_rows(tmp_path / f"node-{node}/data", random_rows(rows, seed=node, labels=True))
    return tmp_path


def test_parts_on_nodes(ranks: Callable[[int], Ranks], folder: Path, nodes: Path) -> None:
    """Every step takes the next rows of each node's part; the part that ends first is filled with masked rows."""
    more = {"train_data": ("data",), "pipe_parallel_size": 2, "gradient_accumulation_steps": 2, "dist_data": True}
    options = options_of(folder, nodes / "log", num_train_epochs=2, **more)
    assert ranks(4).run(train_rank_on_node, options, nodes, 2) == [None] * 4
    batches: list[list[dict[str, np.ndarray]]] = []
    for epoch in range(2):
        one, other = (rows_in_order(nodes / f"node-{node}/data", seed=7, epoch=epoch) for node in (0, 1))
        batches.extend([*one[at : at + 2], *other[at : at + 2]] for at in range(0, 10, 2))
    losses, _, _ = train_reference(folder / "model", batches, options=REFERENCE)
    straight = losses_of(nodes / "log")
    np.testing.assert_allclose(straight, losses, atol=1e-5)
    # The cursor counts the rows of both parts, and leads back to the same place in each.
    stopped = {"checkpoint": nodes / "ckpt", "steps_per_checkpoint": 1, "log_dir": nodes / "resumed"}
    for last in (4, 10):
        assert (
            ranks(4).run(train_rank_on_node, {**options, **stopped, "max_steps": last, "resume_ckpt": "auto"}, nodes, 2)
            == [None] * 4
        )
    assert losses_of(nodes / "resumed") == straight


def test_parts_without_the_option_are_out_of_sync(ranks: Callable[[int], Ranks], folder: Path, nodes: Path) -> None:
    more = {"train_data": ("data",), "pipe_parallel_size": 1, "max_steps": 1}
    answers = ranks(2).run(train_rank_on_node, options_of(folder, nodes / "log", **more), nodes, 1)
    for answer in answers:
        assert answer is not None
        assert answer.startswith("data out of sync: data is another data set on the node of rank 1")


def test_a_document_has_the_same_loss_packed_or_alone(
    ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(3)
    documents = [rng.integers(0, VOCABULARY, int(length)).tolist() for length in rng.integers(3, 14, 12)]
    packed = [
        {
            "input_ids": [*chain(*documents[at : at + 4])],
            "cu_seqlens": np.cumsum([0, *map(len, documents[at : at + 4])]),
        }
        for at in range(0, 12, 4)
    ]
    write_rows(tmp_path / "packed", packed)
    write_rows(tmp_path / "alone", [{"input_ids": document} for document in documents])
    found = {}
    for block_mask in (True, False):
        more = {
            "eval_data": (str(tmp_path / "packed"), str(tmp_path / "alone")),
            "learning_rate": 0.0,
            "max_steps": 1,
            "pipe_parallel_size": 2,
            "block_mask": block_mask,
        }
        log = tmp_path / f"log-{block_mask}"
        assert ranks(2).run(train_rank, options_of(folder, log, **more)) == [None] * 2
        evaluations = [record for record in records(log, "eval_loss") if record["step"] == 0]
        assert [record["eval_tokens"] for record in evaluations] == [sum(map(len, documents)) - 12] * 2
        found[block_mask] = [record["eval_loss"] for record in evaluations]
    assert abs(found[True][0] - found[True][1]) < 1e-5
    assert abs(found[False][0] - found[False][1]) > 1e-3


def test_text_is_converted_first(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """JSON lines with a text, and a chat; converted once, with the model's tokenizer, in rows that fit."""
    model = make_byte_tokenizer(tiny_llama(tmp_path / "model", tied=True, vocabulary=407))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": "abc de " * n}) + "\n" for n in range(1, 9)))
    more = {
        "model": model,
        "train_data": (str(tmp_path / "texts.jsonl"),),
        "eval_data": (f"same={tmp_path / 'texts.jsonl'}",),
        "seq_len": 32,
        "max_steps": 1,
        "clean": True,
    }
    for _ in range(2):
        [answer] = ranks(1).run(train_rank, options_of(folder, tmp_path / "log", **more))
        assert answer is None
    made = open_data_set(tmp_path / "texts_model_33")
    assert made.manifest.longest_row == 33
    [record] = [r for r in records(tmp_path / "log", "eval_loss") if r["step"] == 0]
    assert record["eval_tokens"] == made.manifest.total("trained_tokens")
    (tmp_path / "broken.jsonl").write_text("{\n" * 30)
    [answer] = ranks(1).run(
        train_rank, options_of(folder, tmp_path / "log", **{**more, "train_data": (str(tmp_path / "broken.jsonl"),)})
    )
    assert answer is not None
    assert "broken.jsonl could not be converted: " in answer
