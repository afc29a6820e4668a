"""What a run refuses before it looks at its data: what the options, the model's configuration and the folders say.

A dry run and a run call `check_start`, on every process, before the processes join.

Cost: reading `config.json`; nothing of the weights. `check_weights` reads all of them.
"""

from pathlib import Path

from jllm.models.dropout import described, set_dropout
from jllm.models.weights.finite import check_stored_weights
from jllm.train.checks.folders import check_folders
from jllm.train.checks.packages import check_packages
from jllm.train.config import TrainConfig
from jllm.train.distributed.deepspeed_settings import deepspeed_settings
from jllm.train.quantisation import read_model_config
from jllm.train.shape import RunShape


def check_start(config: TrainConfig, shape: RunShape) -> list[str]:
    """Refuse what cannot be trained; what a person should know of the rest, one line each.

    Raises:
        UserError: folders that cannot be written to, packages that are not there, settings that DeepSpeed does not
            take, a model whose configuration is wrong, or that has no dropout to replace.
    """
    check_folders(config)
    check_packages(config)
    deepspeed_settings(config, shape)
    assert config.model is not None
    model_config = read_model_config(config)
    said = described(model_config, config.dropout)
    set_dropout(model_config, config.dropout)
    return [said] if said is not None else []


def check_weights_if_asked(config: TrainConfig) -> list[str]:
    """Read the weights of `--model` where `--check_weights` asks for it; what was found, one line each.

    Raises:
        UserError: some are not finite, or a file cannot be read.
    """
    if not config.check_weights or not config.reads_weights:
        return []
    model = config.model
    assert isinstance(model, Path)
    check_stored_weights(model)
    return [f"weights: all of {model} are finite"]
