"""The folder of a model or an adapter at the end of a run, or out of a checkpoint."""

import shutil
from pathlib import Path

from jllm import atomic
from jllm.models.adapters.adapter_folder import AdapterFolder
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.tensor_parallel.saving import sliced_files
from jllm.models.weights.saving import STAGE_METADATA, ExportedFolder, ModelFolder
from jllm.models.weights.tensor_file import tensor_file
from jllm.train.distributed.agreement import Agreement


def export(
    stage: PipelineStage,
    agreement: Agreement,
    folder: Path,
    kind: ExportedFolder,
    *,
    chat_template: str | None = None,
) -> None:
    """Write `folder`: the parts of all stages, and what is no tensor.

    Every process calls it. The folder appears, or is replaced, when it is complete. `chat_template` is that of the
    data, for a model without one.
    """
    temporary = folder.with_name(f".{folder.name}{atomic.TEMPORARY_SUFFIX}")
    if agreement.place.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    agreement.barrier()
    if agreement.mesh.tensor > 1:
        _write_slices(stage, agreement, temporary, kind)
    elif agreement.place.is_writer:
        for name, tensors in kind.stage_files(stage.model, stage.span):
            tensor_file(tensors, STAGE_METADATA, copy=False).write(temporary / name)
    agreement.barrier()
    if agreement.place.is_first:
        kind.complete(temporary)
        kind.write_companions(stage.model, temporary, chat_template=chat_template)
        for path in temporary.iterdir():
            atomic.sync_file(path)
        folder.mkdir(parents=True, exist_ok=True)
        _replace_files(temporary, folder, kind)
    agreement.barrier()


def _write_slices(stage: PipelineStage, agreement: Agreement, folder: Path, kind: ExportedFolder) -> None:
    """Have all slices of each stage write its files together."""
    place, files = agreement.place, []
    if place.is_writer and isinstance(kind, AdapterFolder):
        from jllm.models.tensor_parallel.adapters import sliced_adapter_files  # here: peft may not be there

        files = sliced_adapter_files(kind, stage.model, stage.span)
    elif place.is_writer:
        assert isinstance(kind, ModelFolder)
        files = sliced_files(
            stage.model,
            stage.span,
            dtype=kind.dtype,
            source=kind.source,
            rank=place.tensor,
            ranks=agreement.mesh.tensor,
        )
    for file in files if place.is_first_slice else ():
        file.begin(folder)
    agreement.barrier()
    for file in files:
        file.write(folder, is_first=place.is_first_slice)


def _replace_files(temporary: Path, folder: Path, kind: ExportedFolder) -> None:
    """Move the new files into `folder`; the marker goes first and comes last, so a folder with one is whole."""
    (folder / kind.marker).unlink(missing_ok=True)
    for path in folder.glob(kind.replaces):
        path.unlink()
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == kind.marker, path.name)):
        if path.is_dir():
            shutil.rmtree(folder / path.name, ignore_errors=True)
        path.replace(folder / path.name)
    temporary.rmdir()
    atomic.sync_file(folder)
