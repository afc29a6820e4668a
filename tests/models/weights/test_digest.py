"""The hash of a folder's weights: any tensor's values, name, shape or dtype count, the cut into files does not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jllm.models.weights.digest import weights_digest, weights_sha256
from tests.fixtures import tiny_llama

Tensors = dict[str, torch.Tensor]
NAME = "model.layers.1.mlp.up_proj.weight"


def changed(tensors: Tensors) -> Tensors:
    return {**tensors, NAME: tensors[NAME] + 1}


def shaped(tensors: Tensors) -> Tensors:
    return {**tensors, NAME: tensors[NAME].reshape(-1)}


def retyped(tensors: Tensors) -> Tensors:
    return {**tensors, NAME: tensors[NAME].view(torch.int32)}


def renamed(tensors: Tensors) -> Tensors:
    return {name.replace("layers.1.mlp.up", "layers.1.mlp.down_up"): value for name, value in tensors.items()}


@pytest.mark.parametrize("change", [changed, shaped, retyped, renamed])
def test_a_change_is_seen_in_its_layer_alone(tmp_path: Path, change: Callable[[Tensors], Tensors]) -> None:
    tiny_llama(tmp_path, tied=False)
    before = weights_digest(tmp_path)
    assert "model.layers.1" in before
    assert "model.norm.weight" in before
    path = tmp_path / "model.safetensors"
    save_file(change(load_file(path)), path)
    after = weights_digest(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"model.layers.1"}


def test_the_order_and_the_metadata_of_files_do_not_count(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tied=False)
    before = weights_digest(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(dict(reversed(load_file(path).items())), path, metadata={"made": "elsewhere"})
    assert weights_digest(tmp_path) == before


def test_the_whole_hash_sees_every_number_and_no_cut(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tied=False)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    before = weights_sha256(tmp_path)
    names = sorted(tensors)
    path.unlink()
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "model-00002-of-00002.safetensors")
    places = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert weights_sha256(tmp_path) == before
    changed_one = tensors[NAME].clone()
    changed_one.view(-1)[777] += 1e-6
    part = tmp_path / places[NAME]
    save_file({**load_file(part), NAME: changed_one}, part)
    assert weights_sha256(tmp_path) != before
    assert weights_digest(tmp_path) is not None
