"""`python -m jllm.shuffle_partition`: shuffle the rows across all files of one already mixed set."""

from jllm.data.shuffle.config import ShuffleConfig
from jllm.options import command


@command(ShuffleConfig, name="shuffle_partition")
def main(config: ShuffleConfig) -> None:
    """Shuffle the rows across all files below a folder, whatever data sets they came from.

    As shuffle_datasets, but the whole folder is one data set: its rows are mixed with one another.
    """
    from jllm.data.shuffle.folder import shuffle_folder

    shuffle_folder(config, one_set=True)
