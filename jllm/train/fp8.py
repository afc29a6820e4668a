"""Whether a run's linear maps multiply in fp8 (`--fp8`): what the device must have, and what came of it.

The maps themselves are `jllm.models.fp8`.
"""

import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models import fp8
from jllm.models.pipeline.span import StageSpan
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement

LEAST_CAPABILITY = (8, 9)
"""Of a CUDA device whose matrix units take fp8: Ada, Hopper and later."""
EMULATED_ON: tuple[str, ...] = ()
"""Devices on which products are emulated instead of refused. None but in tests: it is slow."""


def check_device(config: TrainConfig) -> None:
    """Raises:
    UserError: the device of this process has no fp8, and `--fp8` asks for it.
    """
    device = get_accelerator().device_name()
    if config.fp8 == "off" or device in EMULATED_ON:
        return
    least = ".".join(map(str, LEAST_CAPABILITY))
    found = f"the device of this run is {device}"
    if device == "cuda":
        capability = torch.cuda.get_device_capability()
        if capability >= LEAST_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}"
    raise UserError(
        f"--fp8 {config.fp8} needs a CUDA device of compute capability {least} or more (Ada, Hopper and later), and"
        f" {found}; drop it"
    )


def use_fp8(model: PreTrainedModel, span: StageSpan, recipe: str) -> None:
    """Have a stage's maps multiply as `--fp8` says; with `off`, leave them.

    Args:
        model: loaded and sealed, or without memory.
        span: of the stage.
        recipe: the option.
    """
    if recipe != "off":
        fp8.use_fp8(model, span, recipe, is_emulated=get_accelerator().device_name() in EMULATED_ON)


def fp8_notes(
    config: TrainConfig, agreement: Agreement, model: PreTrainedModel, span: StageSpan, *, is_compiled: bool
) -> list[str]:
    """For people, a line each: how many maps multiply in fp8, and what keeps that from paying. None where it is off.

    Args:
        config: the options.
        agreement: the processes; all of them call it.
        model: of this process's stage.
        span: likewise.
        is_compiled: whether its decoder layers are compiled.

    Raises:
        UserError: on every process: there is no such map on any stage.
    """
    if config.fp8 == "off":
        return []
    # Pipelines have the same stages.
    by_stage = dict(agreement.gather((span.index, fp8.count_maps(model, span))))
    total, in_fp8 = (sum(counts) for counts in zip(*by_stage.values(), strict=True))
    if not in_fp8:
        raise UserError(
            f"--fp8 {config.fp8}: the decoder layers of model type {model.config.model_type!r} have no linear map"
            f" whose sizes are multiples of {fp8.MULTIPLE}; drop it"
        )
    left = f"; others route, or their sizes are no multiples of {fp8.MULTIPLE}" if in_fp8 < total else ""
    notes = [f"fp8: {in_fp8:,} of {total:,} linear maps of decoder layers ({config.fp8}){left}"]
    if not is_compiled:
        notes.append("fp8 pays where decoder layers are compiled, and they are not: give --compile on, or drop --fp8")
    return notes
