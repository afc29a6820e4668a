"""`--clean`: start over in folders that earlier runs wrote."""

from pathlib import Path

from jllm import atomic
from jllm.errors import UserError
from jllm.train.config import TrainConfig, named_folders, weighted_folders
from jllm.train.distributed.agreement import Agreement
from jllm.train.lifecycle.run_lock import PREFIX


def remove_earlier_runs(config: TrainConfig, agreement: Agreement) -> None:
    """Remove `--checkpoint`, `--output_dir` and `--log_dir` with all they hold, on every node.

    Raises:
        UserError: on every process, before anything is removed, as `removable_folders` says.
    """
    folders = removable_folders(config)
    if agreement.is_first_of_node:
        for folder in folders:
            for path in folder.iterdir() if folder.is_dir() else ():
                if not path.name.startswith(PREFIX):  # the lock of this run
                    atomic.remove_tree(path)
    agreement.barrier()


def removable_folders(config: TrainConfig) -> list[Path]:
    """The folders that `--clean` empties.

    Raises:
        UserError: the model, data or the working folder lies in one, or one is a link.
    """
    folders = [folder for folder in (config.checkpoint, config.output_dir, config.log_dir) if folder is not None]
    needed = [Path.cwd(), Path.home(), *(each.folder for each in weighted_folders(config))]
    needed += [each for each in (config.model, config.config, config.ds_config) if each is not None]
    needed += named_folders(config.eval_data).values()
    for folder in folders:
        if folder.is_symlink():
            raise UserError(f"--clean: {folder} is a link, and nothing is removed through one; name the folder itself")
        for other in needed:
            if other.resolve().is_relative_to(folder.resolve()):
                raise UserError(f"--clean would remove {folder}, which holds {other}; give folders of their own")
    return folders
