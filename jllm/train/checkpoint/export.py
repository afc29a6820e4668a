"""The Hugging Face folder at the end of a run, or out of a checkpoint."""

import shutil
from pathlib import Path

import torch

from jllm import atomic
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.train.distributed.agreement import Agreement

CONFIG_NAME = "config.json"


def export(
    stage: PipelineStage,
    agreement: Agreement,
    folder: Path,
    *,
    source: Path,
    dtype: torch.dtype,
    chat_template: str | None = None,
) -> None:
    """Write `folder` for plain `from_pretrained`: the weights of all stages, and what `source` has beside its weights.

    Every process calls it. The folder appears, or is replaced, when it is complete; the weights have `dtype`.
    `chat_template` is that of the data, for a `source` without one.
    """
    temporary = folder.with_name(f".{folder.name}{atomic.TEMPORARY_SUFFIX}")
    if agreement.place.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    agreement.barrier()
    if agreement.place.is_writer:
        save_stage(stage.model, stage.span, temporary, dtype=dtype)
    agreement.barrier()
    if agreement.place.is_first:
        write_index(temporary)
        write_companions(stage.model, temporary, dtype=dtype, source=source, chat_template=chat_template)
        for path in temporary.iterdir():
            atomic.sync_file(path)
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(temporary, folder)
    agreement.barrier()


def _replace_files(temporary: Path, folder: Path) -> None:
    """Move the new files into `folder`; config.json goes first and comes last, so a folder with one is whole."""
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == CONFIG_NAME, path.name)):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    temporary.rmdir()
    atomic.sync_file(folder)
