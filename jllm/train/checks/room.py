"""Whether the disks of a run have room for what it writes: one checkpoint, and the folder that it leaves at its end.

What an optimizer keeps for a parameter is there after the first step only, so it is counted by its kind and not looked
at. A run and a dry run count alike; a dry run takes all nodes to share the folders.

Guarantees: a disk that is refused has no room; one that passes may be filled by others meanwhile.
Cost: the sizes of tensors, and a message from each process.
"""

from torch import nn

from jllm.errors import UserError
from jllm.machine import require_disk
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import ExportedFolder
from jllm.parallel.mesh import Place
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement
from jllm.train.optim.optimizers import KINDS
from jllm.train.options.optimizer import WITHOUT_MASTERS


def check_room(
    config: TrainConfig, agreement: Agreement, stage: PipelineStage, kind: ExportedFolder, *, alone: bool
) -> None:
    """Every process of a run calls it.

    Args:
        alone: whether each node keeps the parts of its own processes.

    Raises:
        UserError: on every process: a disk is too full.
    """
    node = agreement.node if alone else 0
    checkpoint = bytes_of_checkpoint(config, stage, kind, agreement.place, alone=alone)
    everyone = agreement.gather((node, checkpoint, bytes_of_export(stage, kind, agreement.place)))
    here = sum(size for other, size, _ in everyone if other == node)
    left = sum(size for _, _, size in everyone)
    found = agreement.gather_first(lambda: _mistake(config, kind, here, left))
    if found is not None:
        raise UserError(found)


def check_room_for_all(config: TrainConfig, place: Place, stage: PipelineStage, kind: ExportedFolder) -> None:
    """The same of a dry run, by a stage that has all layers.

    Raises:
        UserError: a disk is too full.
    """
    checkpoint = bytes_of_checkpoint(config, stage, kind, place, alone=False)
    found = _mistake(config, kind, checkpoint, bytes_of_export(stage, kind, place))
    if found is not None:
        raise UserError(found)


def bytes_of_checkpoint(
    config: TrainConfig, stage: PipelineStage, kind: ExportedFolder, place: Place, *, alone: bool
) -> int:
    """What a process writes of a checkpoint, about. Copies of a stage take turns in that; here the first has it all."""
    if config.only_exports:
        return bytes_of_export(stage, kind, place)
    if not (alone or place.is_writer):
        return 0
    shared = len(place.copies) if alone and config.resolved_zero_stage else 1
    held = [each for each in stage.stored_parameters().values() if alone or not _is_copied(each)]
    weights = sum(each.nbytes for each in held)
    return weights + int(sum(_state_bytes(config, each) for each in held if each.requires_grad) / shared)


def bytes_of_export(stage: PipelineStage, kind: ExportedFolder, place: Place) -> int:
    """What a process writes of the folder that the run leaves, about."""
    return kind.size(stage.model) if place.is_writer else 0


def _state_bytes(config: TrainConfig, parameter: nn.Parameter) -> float:
    """What the optimizer keeps for a parameter, its fp32 master included."""
    moments = KINDS[config.optimizer].moments
    if config.optimizer in WITHOUT_MASTERS:
        return parameter.nbytes * moments
    has_master = parameter.itemsize < 4 or bool(config.resolved_zero_stage)
    return parameter.numel() * 4 * (moments + has_master)


def _is_copied(parameter: nn.Parameter) -> bool:
    """Whether another process has it too, and writes it."""
    return bool(getattr(parameter, "ds_pipe_replicated", False))


def _mistake(config: TrainConfig, kind: ExportedFolder, checkpoint: int, left: int) -> str | None:
    """Why there is no room, by what this process sees."""
    try:
        if config.checkpoint is not None and config.num_train_epochs > 0:
            require_disk(config.checkpoint, checkpoint, "a checkpoint", option="--checkpoint ")
        folder = config.output_dir
        # Where a run that goes on had ended, its folder may be there already.
        if folder is not None and not (config.resume_ckpt is not None and (folder / kind.marker).exists()):
            require_disk(folder, left, "the folder that the run leaves", option="--output_dir ")
    except UserError as error:
        return str(error)
    return None
