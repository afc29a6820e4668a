"""`deepspeed --module jllm.train_pipe`: train a model over a pipeline of processes."""

from jllm.options import command
from jllm.train.config import TrainConfig


@command(TrainConfig, name="train_pipe")
def main(config: TrainConfig) -> None:
    """Train a Hugging Face decoder on token-id shards, with pipeline and data parallelism.

    Start it through the launcher, one process for each device:

    \b
    deepspeed --module jllm.train_pipe --model FOLDER --train_data FOLDER \\
        --pipe_parallel_size 4 --output_dir FOLDER
    """
    from jllm.train.distributed.launch import run_rank
    from jllm.train.trainer import run

    run_rank(lambda: run(config))
