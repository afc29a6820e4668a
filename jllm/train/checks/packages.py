"""The packages that only some options need: there, or refused by name.

Cost: importing those that the run needs anyway.
"""

from collections.abc import Iterator

from jllm.machine import require_package
from jllm.models.weights.quantisation import stored_quantisation
from jllm.train.config import TrainConfig

OF_OPTIMIZERS = {"adamw_8bit": "bitsandbytes", "adamw_kahan": "optimi", "schedule_free": "schedulefree"}
"""`--optimizer` → what it is imported from."""


def check_packages(config: TrainConfig) -> None:
    """Import what the options need.

    Raises:
        UserError: one is not installed, or cannot be imported.
    """
    for option, package, extra in _needed(config):
        require_package(package, option, extra)


def _needed(config: TrainConfig) -> Iterator[tuple[str, str, str]]:
    if config.has_lora:
        yield "--lora" if config.lora is not None else "--lora_dim", "peft", "adapters"
    if config.load_in is not None:
        yield f"--{config.load_in}", "bitsandbytes", "adapters"
    elif config.has_adapters and config.model is not None and stored_quantisation(config.model) is not None:
        yield f"--model {config.model}, which is quantised,", "bitsandbytes", "adapters"
    if config.optimizer in OF_OPTIMIZERS:
        yield f"--optimizer {config.optimizer}", OF_OPTIMIZERS[config.optimizer], "optimizers"
    if config.fp8 != "off":
        yield f"--fp8 {config.fp8}", "torchao", "fp8"
