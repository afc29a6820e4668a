"""`deepspeed --module jllm.train_pipe`: train a model over a pipeline of processes."""

import contextlib
import sys

from jllm.errors import report
from jllm.options import command
from jllm.train.config import TrainConfig


def _refuse(message: str) -> None:
    """Say a mistake on the command line, and tell the other nodes, which would wait."""
    from jllm.train.distributed.start import tell_mistake

    tell_mistake(message, report)


@command(TrainConfig, name="train_pipe", refusal=_refuse)
def main(config: TrainConfig) -> None:
    """Train a Hugging Face decoder on token-id shards, with pipeline and data parallelism.

    On one machine it starts its processes itself, one for each stage of a pipeline, or --processes of them:

    \b
    jllm train --model FOLDER --train_data FOLDER --pipe_parallel_size 4 \\
        --output_dir FOLDER

    On several machines, and wherever you like, through the launcher, one process for each device; with --log_level
    critical it adds nothing to what a run says at its end:

    \b
    deepspeed --log_level critical --module jllm.train_pipe --model FOLDER \\
        --train_data FOLDER --pipe_parallel_size 4 --output_dir FOLDER
    """
    from jllm.train.distributed.start import start_processes, starts_processes

    if starts_processes(config):
        sys.exit(start_processes(config))
    # DeepSpeed greets on what is standard output when it is imported, which is JSON alone here.
    with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
        from jllm.train.distributed.launch import run_rank
        from jllm.train.trainer import run

    run_rank(lambda: run(config))
