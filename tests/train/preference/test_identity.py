"""References of another model, another precision or other labels are refused by name, by a dry run as by a run."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jllm.data.dataset.describe import describe
from jllm.data.dataset.manifest import Manifest, entry_of_written, open_data_set, read_manifest, write_manifest
from jllm.data.dataset.reader import ShardReader
from jllm.data.dataset.shards import ShardWriter, to_list_array
from jllm.errors import UserError
from jllm.models.weights.digest import weights_sha256
from jllm.train.config import TrainConfig
from jllm.train.trainer import run
from tests.data.pairs import random_pairs, write_pairs
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, train_rank
from tests.fixtures import random_rows, tiny_llama, write_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identity")
    tiny_llama(folder / "model", tied=False, layers=2)
    write_pairs(folder / "data", random_pairs(12, vocab=97), length=60)
    answer = Ranks(1).run(train_rank, options_of(folder, write_ref_logps=folder / "ref", pipe_parallel_size=1))
    assert answer == [None]
    return folder


def of_run(folder: Path, **more: Any) -> dict[str, Any]:
    settings = {"train_data": (str(folder / "ref"),), "loss": "dpo", "pipe_parallel_size": 1}
    return options_of(folder, settings, **more)


def refusal(options: dict[str, Any]) -> str:
    with pytest.raises(UserError) as error:
        run(TrainConfig(**options, dry_run=True))
    said = str(error.value)
    assert "\n" not in said
    return said


def test_what_fits_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(TrainConfig(**of_run(folder), dry_run=True))
    assert "block_mask" in capsys.readouterr().out, "which pairs imply"


def test_one_other_number_is_another_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][17, 13] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    assert weights_sha256(tmp_path / "model") != weights_sha256(folder / "model")
    said = refusal(of_run(folder, model=tmp_path / "model"))
    assert "its ref_logps were made by model (" in said
    assert "other weights" in said
    assert "--write_ref_logps" in said


def test_precision_and_attention(folder: Path) -> None:
    said = refusal(of_run(folder, precision="bf16"))
    assert "were made with --precision fp32, and this run has bf16" in said
    said = refusal(of_run(folder, attn_implementation="eager"))
    assert "were made with --attn_implementation" in said
    assert "and this run has eager" in said


def changed(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """The set with references, its columns changed, under a manifest that fits its files."""
    source = open_data_set(folder / "ref")
    [entry] = source.manifest.files
    path = tmp_path / "set" / entry.path
    [batch] = list(ShardReader(source.folder / entry.path))
    columns = change(dict(zip(batch.schema.names, batch.columns, strict=True)))
    with ShardWriter(
        path, columns=("input_ids", "labels", "cu_seqlens"), further=source.manifest.further.carried
    ) as to:
        to.write(type(batch).from_arrays([columns[name] for name in batch.schema.names], schema=batch.schema))
    files = (entry_of_written(path, tmp_path / "set", to.statistics),)
    write_manifest(tmp_path / "set", dataclasses.replace(source.manifest, files=files))
    return tmp_path / "set"


def with_one_label_less(columns: dict[str, Any]) -> dict[str, Any]:
    labels = columns["labels"].values.to_numpy().copy()
    trained = np.flatnonzero(labels != -100)
    labels[trained[np.flatnonzero(np.diff(trained) == 1)[0] + 1]] = -100
    return {**columns, "labels": to_list_array(labels, columns["labels"].offsets.to_numpy().astype(np.int64))}


def with_other_numbers(columns: dict[str, Any]) -> dict[str, Any]:
    numbers = columns["ref_logps"].values.to_numpy().copy()
    numbers[0] = np.nan
    offsets = columns["ref_logps"].offsets.to_numpy().astype(np.int64)
    return {**columns, "ref_logps": to_list_array(numbers, offsets)}


@pytest.mark.parametrize(
    ("change", "said"),
    [(with_one_label_less, "were made of other tokens or labels"), (with_other_numbers, "is not finite")],
    ids=["label", "number"],
)
def test_rows_that_were_changed(folder: Path, tmp_path: Path, change: Any, said: str) -> None:
    """Found where the row is read, whatever the manifest says."""
    given = changed(folder, tmp_path, change)
    [answer] = Ranks(1).run(train_rank, of_run(folder, train_data=(str(given),), max_steps=20))
    assert said in answer
    assert ".parquet: row group 0, row " in answer


def test_references_whose_manifest_was_replaced(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ref", tmp_path / "ref")
    (tmp_path / "ref" / "_manifest.json").unlink()
    said = refusal(of_run(folder, train_data=(str(tmp_path / "ref"),)))
    assert "nothing says which model made its ref_logps" in said
    shutil.copy(folder / "ref" / "_manifest.json", tmp_path / "ref" / "_manifest.json")
    manifest = describe(tmp_path / "ref", force=True, cores=1, tokenizer=None)
    assert manifest.reference == open_data_set(folder / "ref").manifest.reference, "kept where it is known"


def test_kinds_do_not_mix(folder: Path, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain", random_rows(9))
    assert "of which --loss cross_entropy would train on the rejected answers" in refusal(
        of_run(folder, loss="cross_entropy")
    )
    manifest = read_manifest(plain)
    assert isinstance(manifest, Manifest)
    write_manifest(plain, dataclasses.replace(manifest, kind="documents"))
    said = refusal(of_run(folder, train_data=(str(plain),)))
    assert "--loss dpo takes preference pairs, and" in said
    assert "has documents" in said
    said = refusal(of_run(folder, train_data=(str(folder / "data"),)))
    assert "has none (no column ref_logps)" in said
    assert "--write_ref_logps FOLDER" in said
    both = (str(folder / "ref"), str(folder / "data"))
    assert "do not have ref_logps of the same model" in refusal(of_run(folder, train_data=both, lora_dim=2))


def test_an_evaluation_set_too(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "ref", tmp_path / "held")
    path = tmp_path / "held" / "_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["reference"]["weights"] = "0" * 64
    path.write_text(json.dumps(manifest))
    said = refusal(of_run(folder, eval_data=(f"held={tmp_path / 'held'}",)))
    assert said.startswith("--eval_data held: its ref_logps were made by model (000000000000)")


def test_options_go_with_their_losses() -> None:
    for more, said in (
        ({"beta": 0.1}, "--beta 0.1: --loss cross_entropy has none"),
        ({"loss": "orpo", "label_smoothing": 0.1}, "--label_smoothing 0.1: --loss orpo has none; give --loss dpo"),
        ({"loss": "dpo", "simpo_gamma": 1.0}, "--simpo_gamma 1: --loss dpo has none; give --loss simpo"),
        ({"pref_ftx": 0.1}, "--pref_ftx 0.1: --loss cross_entropy has none"),
        ({"loss": "dpo", "loss_gamma": 2.0}, "--loss_gamma 2: --loss dpo has none"),
        ({"loss": "dpo", "label_smoothing": 0.6}, "--label_smoothing 0.6"),
        ({"loss": "dpo", "beta": 0.0}, "--beta 0"),
        ({"loss": "dpo", "control_adapter_rank": 2}, "--control_adapter_rank trains on classes of text"),
        ({"loss": "dpo", "write_ref_logps": Path("x")}, "--write_ref_logps trains nothing"),
    ):
        with pytest.raises(UserError) as error:
            TrainConfig(model=Path("m"), train_data=("d",), **more)  # type: ignore[arg-type]
        assert said in str(error.value)


def test_defaults() -> None:
    for loss, beta in (("dpo", 0.1), ("orpo", 0.1), ("simpo", 2.0)):
        config = TrainConfig(model=Path("m"), train_data=("d",), loss=loss)
        assert config.resolved_beta == beta
        assert config.block_mask
        assert config.needs_reference == (loss == "dpo")
    assert not TrainConfig(model=Path("m"), train_data=("d",)).block_mask


def test_families_that_mix_documents_are_refused(tmp_path: Path) -> None:
    from tests.models.tiny import tiny_config

    tiny_config("mamba").save_pretrained(tmp_path / "model")
    said = refusal({"model": tmp_path / "model", "train_data": ("d",), "loss": "orpo", "init": True})
    assert "mamba" in said
