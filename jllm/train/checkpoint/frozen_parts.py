"""What a run with adapters goes on from and does not store: the model, how it is held, and an adapter it began with.

Guarantees: a checkpoint's adapters go on beside the weights that they were trained beside, or the run is refused.
Cost: some short reads of each tensor of the model.
"""

from collections.abc import Mapping
from typing import Any

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import read_fields
from jllm.models.weights.digest import weights_digest
from jllm.train.config import TrainConfig
from jllm.train.quantisation import described, quantisation_record

BASE, QUANTISATION, ADAPTER_CONFIG = "base", "quantisation", "adapter_config"


def frozen_parts(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps of them, as JSON values."""
    assert config.model is not None
    base = f"random weights of --seed {config.seed}" if config.init else weights_digest(config.model)
    given = None if config.lora is None else read_fields(config.lora)
    return {BASE: base, QUANTISATION: quantisation_record(config), ADAPTER_CONFIG: given}


def check_same_frozen_parts(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare what a checkpoint keeps with that of this run.

    Raises:
        UserError: the model, its quantisation or the adapter of `--lora` is another.
    """
    # A run without adapters has none, which the option that differs says better.
    if BASE in saved and BASE in now and saved[BASE] != now[BASE]:
        raise UserError(
            "--model has other weights than the model that the checkpoint's adapters were trained on; give that model,"
            " or --force_resume"
        )
    then, given = saved.get(QUANTISATION), now.get(QUANTISATION)
    if then != given:
        raise UserError(
            f"the model was {described(then)} in the checkpoint's run and is {described(given)} now; give the options"
            " of that run (--load_in_4bit and those beside it), or --force_resume"
        )
    if saved.get(ADAPTER_CONFIG) != now.get(ADAPTER_CONFIG):
        raise UserError("--lora was another adapter in the checkpoint's run; give that one, or --force_resume")
