"""The folders of checkpoints: their names, which of them are complete, and how one appears and goes.

A checkpoint is written in a temporary folder and renamed when it is complete. A folder without its marker, the index,
does not exist: it is neither listed nor found.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from jllm import atomic
from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME
from jllm.train.config import TrainConfig

INDEX_NAME = "index.json"
EVALUATION_NAME = "evaluation.json"
MODEL_MARKER, ADAPTER_MARKER = "config.json", CONFIG_NAME
"""What makes a checkpoint of `--only_ckpt_model`, a Hugging Face folder, and one of `--only_ckpt_lora` complete."""

_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TAG = re.compile(r"(?:step-|global_step)?0*(\d{1,18})", re.ASCII)
"""The ways in which people name a step: 1000, step-1000, step-00001000, and DeepSpeed's global_step1000."""


def marker_of(config: TrainConfig) -> str:
    """What makes a checkpoint of this run complete."""
    if config.only_exports is None:
        return INDEX_NAME
    return ADAPTER_MARKER if config.has_adapters else MODEL_MARKER


def folder_of_step(root: Path, step: int) -> Path:
    """The checkpoint folder of a step."""
    return root / f"step-{step:08d}"


def step_of_folder(folder: Path) -> int:
    """The inverse of `folder_of_step`."""
    return int(folder.name.removeprefix("step-"))


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f".{folder.name}{atomic.TEMPORARY_SUFFIX}")


def rank_file_name(rank: int) -> str:
    """The file that process `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def receipt_path(folder: Path, rank: int) -> Path:
    """What process `rank` writes, into the temporary folder, when its file of checkpoint `folder` is complete."""
    return (temporary_folder(folder) / rank_file_name(rank)).with_suffix(".json")


def publish(folder: Path) -> None:
    """Give the temporary folder of a checkpoint, complete now, its name."""
    if folder.exists():
        remove_checkpoint(folder)
    os.replace(temporary_folder(folder), folder)
    atomic.sync_file(folder.parent)


def list_checkpoints(root: Path, *, marker: str = INDEX_NAME) -> list[Path]:
    """The complete checkpoints below `root`, oldest first, by step number."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _STEP_FOLDER.fullmatch(path.name) and (path / marker).is_file()]
    return sorted(found, key=step_of_folder)


def remove_incomplete(root: Path) -> None:
    """Remove what was being written, or removed, when a run died."""
    for path in root.glob(f".step-*{atomic.TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            atomic.remove_tree(path)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; killed in between, it no longer exists either. Of a link, only the link goes."""
    if folder.is_symlink():
        folder.unlink()
        return
    for marker in (INDEX_NAME, MODEL_MARKER, ADAPTER_MARKER):
        (folder / marker).unlink(missing_ok=True)
    gone = temporary_folder(folder).with_name(f".{folder.name}.old{atomic.TEMPORARY_SUFFIX}")
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def find_checkpoint(given: Path, tag: str | None, *, option: str) -> Path:
    """The checkpoint a user means: `given` itself, or the one in it that `tag` names, or the newest complete one there.

    A tag is the name of a folder, or the number of a step.

    Raises:
        UserError: there is none.
    """
    if tag is not None:
        step = _TAG.fullmatch(tag)
        for folder in (given / tag, *([folder_of_step(given, int(step[1]))] if step is not None else [])):
            if (folder / INDEX_NAME).is_file():
                return folder
        known = ", ".join(path.name for path in list_checkpoints(given)[-5:]) or "none"
        raise UserError(f"--tag {tag}: no complete checkpoint of that name in {given} (there: {known})")
    if (given / INDEX_NAME).is_file():
        return given
    checkpoints = list_checkpoints(given)
    if not checkpoints:
        raise UserError(f"{option} {given}: no complete checkpoint there; give the folder that --checkpoint named")
    return checkpoints[-1]
