"""Going on from a checkpoint: which one, whether it fits this run, and weights alone."""

import dataclasses
from pathlib import Path

from jllm.errors import UserError
from jllm.models.stage import PipelineStage, published_names
from jllm.train.agreement import Agreement
from jllm.train.checkpoint import (
    CheckpointReader,
    RunState,
    find_checkpoint,
    folder_of_step,
    list_checkpoints,
    step_of_folder,
)
from jllm.train.config import TrainConfig
from jllm.train.state import MASTER, WEIGHT

BINDING_OPTIONS = (
    "optimizer",
    "learning_rate",
    "lr_min",
    "lr_scheduler_type",
    "lr_cycles",
    "num_warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "gradient_clipping",
    "precision",
    "seed",
    "no_shuf",
    "block_mask",
    "seq_len",
    "global_batch",
    "batch_size_tokens",
)
"""Options whose change would make the rest of the run another run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resumed:
    """The checkpoint that a run goes on from."""

    folder: str


def find_resume_point(config: TrainConfig, agreement: Agreement) -> Resumed | None:
    """The checkpoint of `--resume_ckpt`, on every process; None to start afresh.

    `auto` takes the newest that is complete on every node. Nodes may have folders of their own.
    """
    if config.resume_ckpt is None:
        return None
    if config.resume_ckpt == "auto":
        assert config.checkpoint is not None
        steps = [set(map(step_of_folder, list_checkpoints(config.checkpoint)))]
        common = set.intersection(*(found for each in agreement.gather(steps) for found in each))
        return Resumed(folder=str(folder_of_step(config.checkpoint, max(common)))) if common else None
    given = Path(config.resume_ckpt)
    name = agreement.from_first_reader(lambda: str(find_checkpoint(given, config.tag, option="--resume_ckpt")))
    return Resumed(folder=name)


def check_same_run(saved: RunState, now: RunState, *, forced: bool) -> None:
    """Refuse, by name, what differs between the checkpoint's run and this one, unless `--force_resume` is given.

    Raises:
        UserError: the data set or a binding option is another one.
    """
    if forced:
        return
    if saved.fingerprint != now.fingerprint:
        raise UserError(
            f"--train_data has changed since the checkpoint (fingerprint {saved.fingerprint[:12]} then,"
            f" {now.fingerprint[:12]} now); train on the same data, or give --force_resume"
        )
    for name in BINDING_OPTIONS:
        then, given = saved.config.get(name), now.config.get(name)
        if then != given:
            shown = "--global_batch_size" if name == "global_batch" else f"--{name}"
            raise UserError(
                f"{shown} was {then} in the checkpoint's run and is {given} now; give {then}, or --force_resume"
            )


def load_weights_only(stage: PipelineStage, config: TrainConfig) -> None:
    """Take the weights of `--from_ckpt` into a stage: the fp32 masters where the checkpoint has them."""
    import torch

    assert config.from_ckpt is not None
    reader = CheckpointReader(find_checkpoint(config.from_ckpt, config.tag, option="--from_ckpt"))
    names = published_names(stage.model, stage.span)
    with torch.no_grad():
        for name, parameter in stage.model.named_parameters():
            published = names[name]
            shape = reader.shape(WEIGHT, published)
            if shape != tuple(parameter.shape):
                raise UserError(
                    f"{reader.folder}: {published} is {'missing' if shape is None else list(shape)}; --model needs"
                    f" {list(parameter.shape)}: give the checkpoint of this model"
                )
            kind = MASTER if parameter.dtype == torch.float32 and reader.shape(MASTER, published) else WEIGHT
            values = reader.read(kind, published, 0, parameter.numel())
            assert values is not None
            parameter.copy_(values.view(parameter.shape))
