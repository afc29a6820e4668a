"""Whether a run's loss is fused with its model's head (`--fused_loss`): what the options ask for, and what came of it.

The options and the device decide first, then the head, which the last stage has looked at
(`jllm.models.pipeline.plain_head`).
"""

from deepspeed.accelerator import get_accelerator

from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import Objective
from jllm.train.objectives.preference import PairLoss, Preference
from jllm.train.options.objective import GAMMA_OF_SIMPO


def pair_loss(config: TrainConfig) -> PairLoss:
    """What a pair adds to the loss of a run."""
    return PairLoss(
        kind=config.loss,
        beta=config.resolved_beta,
        smoothing=config.label_smoothing or 0.0,
        gamma=GAMMA_OF_SIMPO if config.simpo_gamma is None else config.simpo_gamma,
        ftx=config.pref_ftx or 0.0,
    )


def training_objective(config: TrainConfig) -> Objective:
    """What a run minimises."""
    if config.is_preference:
        return Preference(pair_loss(config), is_fused=wants_fused_loss(config))
    return CrossEntropy(config.loss, config.loss_gamma or 1.0, is_fused=wants_fused_loss(config))


def wants_fused_loss(config: TrainConfig) -> bool:
    """Whether the loss is to be fused where the head is a plain one."""
    return _against(config) is None


def fused_loss_note(config: TrainConfig, *, is_plain: bool) -> str:
    """A line for people: whether the loss is fused, and why it is not.

    Args:
        config: the options.
        is_plain: whether the head is a plain one.

    Raises:
        UserError: it must be, and cannot.
    """
    reason = _against(config)
    if reason is None and not is_plain:
        reason = "the model's head is more than a product, a factor and a soft cap, or has adapters"
        if config.fused_loss == "on":
            raise UserError(f"--fused_loss on: {reason}; give auto or off")
    return f"loss: not fused with the head: {reason}" if reason is not None else "loss: fused with the head"


def _against(config: TrainConfig) -> str | None:
    """Why the options and the device say no."""
    if config.fused_loss == "off":
        return "--fused_loss off"
    if config.model_parallel_size > 1 and config.is_preference:
        return f"--model_parallel_size {config.model_parallel_size} with --loss {config.loss}"
    if config.fused_loss == "auto" and config.precision == "fp16":
        return "--precision fp16"
    if config.fused_loss == "auto" and get_accelerator().device_name() != "cuda":
        return "it gains nothing on this device"
    return None
