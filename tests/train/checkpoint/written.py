"""Small checkpoints of one parameter, written as a run writes them."""

import math
from pathlib import Path

import torch

from jllm.train.checkpoint.folders import folder_of_step, temporary_folder
from jllm.train.checkpoint.format import Piece, RunState, commit, prepare_file, write_file
from jllm.train.checkpoint.regions import Region
from jllm.train.data.loader import Cursor


def state_of(step: int) -> RunState:
    """Where a run stands after `step`."""
    return RunState(
        step=step,
        cursor=Cursor(epoch=1, rows=20),
        fingerprint="f",
        optimizer_steps=2,
        consumed_tokens=5,
        consumed_rows=6,
        eval_loss=None,
        rebounds=0,
        config={"seed": 1},
    )


def whole_tensor(shape: tuple[int, ...]) -> torch.Tensor:
    """The parameter: its elements are their own numbers."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


def elements(region: Region) -> torch.Tensor:
    """The elements of a region of `whole_tensor`, by torch alone."""
    rectangle = tuple(slice(begin, begin + count) for begin, count in zip(region.offset, region.extent, strict=True))
    return whole_tensor(region.shape)[rectangle].reshape(-1)[region.start : region.stop]


def write_checkpoint(root: Path, files: list[list[Region]], *, step: int = 3) -> Path:
    """A checkpoint of the parameter "w", of which each file has some regions."""
    folder = folder_of_step(root, step)
    temporary_folder(folder).mkdir(parents=True)
    for rank, held in enumerate(files):
        pieces = [Piece(kind="weight", name="w", region=region, tensor=elements(region)) for region in held]
        write_file(prepare_file(pieces, {"cpu": torch.tensor([rank], dtype=torch.uint8)}, copy=False), folder, rank)
    commit(folder, state_of(step), range(len(files)))
    return folder
