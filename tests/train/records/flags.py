"""What the trainer's command line makes of flags."""

from jllm.options import command
from jllm.train.config import TrainConfig


def parse(*arguments: str) -> TrainConfig:
    """What the trainer's command line gives."""
    seen: list[TrainConfig] = []
    command(TrainConfig, name="train_pipe")(seen.append)(list(arguments))
    return seen[0]
