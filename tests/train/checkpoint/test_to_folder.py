"""Weights that lie in rectangles and runs on many ranks become the model that they are of.

That the folder is the trainer's own, byte for byte, is shown by tests/distributed/test_cat2hf.py.
"""

import dataclasses
import itertools
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jllm.errors import UserError
from jllm.models.weights.source import read_config
from jllm.train.checkpoint.folders import folder_of_step, temporary_folder
from jllm.train.checkpoint.format import WEIGHT, Piece, commit, prepare_file, write_file
from jllm.train.checkpoint.regions import Region
from jllm.train.checkpoint.to_folder import to_folder
from jllm.train.checkpoint.weights_alone import architecture_of
from tests.fixtures import tiny_llama
from tests.models.tiny import tiny_config
from tests.train.checkpoint.written import state_of


def cut(shape: tuple[int, ...], ranks: int, chance: random.Random) -> list[Region]:
    """A tensor in as many rectangles along one axis, as tensor-parallel ranks have it, each in two runs."""
    axis = chance.randrange(len(shape))
    edges = [number * shape[axis] // ranks for number in range(ranks + 1)]
    found = []
    for start, stop in itertools.pairwise(edges):
        offset, extent = [0] * len(shape), list(shape)
        offset[axis], extent[axis] = start, stop - start
        region = Region.of(shape, offset=tuple(offset), extent=tuple(extent))
        middle = chance.randint(0, region.size)
        found += [region.run(0, middle), region.run(middle, region.size)]
    return found


def write_checkpoint(model: Path, root: Path, *, ranks: int = 4, without: str | None = None) -> None:
    """A checkpoint of the weights of a model, whose parts lie on any rank."""
    chance = random.Random(1)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    pieces: list[list[Piece]] = [[] for _ in range(ranks)]
    for name, value in weights.named_parameters():
        if name == without:
            continue
        for region in cut(tuple(value.shape), ranks, chance):
            place = tuple(slice(at, at + count) for at, count in zip(region.offset, region.extent, strict=True))
            flat = value.detach()[place].reshape(-1)[region.start : region.stop]
            pieces[chance.randrange(ranks)].append(Piece(kind=WEIGHT, name=name, region=region, tensor=flat.clone()))
    folder = folder_of_step(root, 3)
    temporary_folder(folder).mkdir(parents=True)
    for rank, held in enumerate(pieces):
        write_file(prepare_file(held, {}, copy=False), folder, rank)
    options = {"model": str(model), "precision": "fp32", "architecture": architecture_of(read_config(model))}
    commit(folder, dataclasses.replace(state_of(3), config=options), range(ranks))


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2", "deepseek_v3"])
def test_parts_of_any_shape(tmp_path: Path, family: str) -> None:
    """Tied or not, with packed experts published one by one, and with what is no parameter and so in no checkpoint."""
    model = tmp_path / "model"
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(family))
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    made.save_pretrained(model)
    write_checkpoint(model, tmp_path / "ckpt")
    to_folder(tmp_path / "ckpt", tmp_path / "made")
    expected, found = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "made"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_weight_is_missing_or_has_no_place(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=False)
    write_checkpoint(model, tmp_path / "ckpt", without="model.norm.weight")
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing; --model needs \[32\]: give the model"):
        to_folder(tmp_path / "ckpt", tmp_path / "made")
    assert not (tmp_path / "made").exists()
