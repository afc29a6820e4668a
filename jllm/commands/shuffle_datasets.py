"""`python -m jllm.shuffle_datasets`: exact global shuffle of every data set in a folder."""

from jllm.data.shuffle.config import ShuffleConfig
from jllm.options import command


@command(ShuffleConfig, name="shuffle_datasets")
def main(config: ShuffleConfig) -> None:
    """Shuffle every data set of a folder by rows, exactly and globally, and deal each to -n files.

    The result depends on the data and --seed alone, not on --cores or memory. Data larger than the memory cap goes
    through scratch files in the output folder. A killed run is finished by running it again.
    """
    from jllm.data.shuffle.folder import shuffle_folder

    shuffle_folder(config, one_set=False)
