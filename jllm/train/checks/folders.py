"""Folders that a run writes to, tried before it starts.

The export is written when a run ends. A folder that cannot be written to is worth knowing weeks before.

Guarantees: nothing of the trial is left. Cost: an empty folder made and removed in each place.
"""

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path

from jllm.errors import UserError
from jllm.train.config import TrainConfig


def check_folders(config: TrainConfig) -> None:
    """Refuse `--checkpoint`, `--output_dir` and the log folder where they cannot be made or written to.

    Raises:
        UserError: the first one, with the reason.
    """
    given = {"checkpoint": config.checkpoint, "output_dir": config.output_dir, "log_dir": config.resolved_log_dir}
    for name, folder in given.items():
        if folder is None:
            continue
        try:
            problem = _problem(folder)
        except OSError as error:
            problem = os.strerror(error.errno) if error.errno else str(error)
        except ValueError as error:  # a name with a zero byte in it
            problem = str(error)
        if problem is not None:
            raise UserError(f"--{name} {folder}: cannot be written to: {problem}; give another folder")


def _problem(folder: Path) -> str | None:
    """Why a folder cannot be written to; None where it can.

    Raises:
        OSError: the file system says why.
    """
    place, missing = folder, list[str]()
    while True:
        try:
            kind = os.stat(place).st_mode
            break
        except FileNotFoundError:
            if os.path.islink(place):
                return f"{place} is a link to {os.readlink(place)}, which is not there"
            if place.parent == place:
                raise
            missing.append(place.name)
            place = place.parent
        except NotADirectoryError:  # something above is a file
            place = place.parent
        except OSError as error:
            if error.errno == errno.ELOOP:
                return f"{place} is a link that leads to itself"
            raise
    if not stat.S_ISDIR(kind):
        return f"{place} is a file" if place == folder else f"{place}, which is above it, is a file"
    for name in missing:  # a name that is too long is told only where the folder that it is in is there
        with contextlib.suppress(FileNotFoundError):
            os.lstat(place / name)
    # A folder where the file system is asked for one: what it says of its rights, limits and space is then the truth.
    trial = place / f".trial-{uuid.uuid4().hex}"
    trial.mkdir()
    trial.rmdir()
    return None
