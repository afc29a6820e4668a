"""`jllm`: one group over all commands. A command's module is imported only when it is called."""

import click

from jllm import __version__
from jllm.options import Group

COMMANDS = {
    "raw2ids": ("jllm.commands.raw2ids:main", "text and chat files to token-id shards"),
    "shuffle": ("jllm.commands.shuffle_datasets:main", "exact global shuffle of data sets"),
    "shuffle-partition": ("jllm.commands.shuffle_partition:main", "shuffle the rows across all files of a folder"),
    "repartition": ("jllm.commands.repartition:main", "deal the files of data sets to equal partitions"),
    "manifest": ("jllm.commands.manifest:main", "describe a folder of shards that others wrote, or check one"),
    "inspect": ("jllm.commands.inspect:main", "show a data set: summary, row lengths, decoded rows; --verify"),
    "plot": ("jllm.commands.plot:main", "draw loss, learning rate, speed and gradient norm of runs"),
    "models": ("jllm.commands.list_models:main", "which model families train in a pipeline, and how that was shown"),
    "plan": ("jllm.commands.plan:main", "how to divide GPUs for training a model: memory and speed of each way"),
    "checkpoint": ("jllm.commands.checkpoint:main", "list the checkpoints of a run, or verify every byte of them"),
    "adapter": ("jllm.commands.adapter:main", "what an adapter does to each module; adapters for llama.cpp"),
    "merge": ("jllm.commands.merge:main", "add a LoRA adapter to the weights of its model"),
    "cat2hf": ("jllm.commands.cat2hf:main", "a checkpoint of the trainer as one Hugging Face folder"),
    "extend_tokenizer": (
        "jllm.commands.extend_tokenizer:main",
        "add tokens to a tokenizer, and rows for them to its model",
    ),
    "convert": ("jllm.commands.convert:main", "older checkpoints (Qwen-1, InternLM2, Baichuan) to a native class"),
    "train": (
        "jllm.commands.train_pipe:main",
        "train, over as many processes of this machine as the pipeline has stages",
    ),
}


@click.group(
    cls=Group,
    lazy=COMMANDS,
    help="jllm: token-id shards, a global shuffle, and a pipeline-parallel trainer.",
)
@click.version_option(__version__, prog_name="jllm", message="%(prog)s %(version)s")
def main() -> None:
    pass


if __name__ == "__main__":
    main()
