"""The index of a model's weights, which names files: those of its own folder, and no others.

Cost: one JSON file.
"""

from pathlib import Path

from jllm import atomic
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED


def files_in_index(index: Path) -> list[Path]:
    """The files that an index names, safetensors or pickled, in order.

    Raises:
        UserError: it is no index, a name leads elsewhere, or a file is missing.
    """
    try:
        found = set(notation.read_json(index)["weight_map"].values())
    except MALFORMED as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{index} is not a weight index ({reason}); download it again") from None
    if problem := next(filter(None, map(atomic.plain_name, found)), None):
        raise UserError(f"{index} is not a weight index ({problem}); download it again")
    names = sorted(found)
    if absent := [name for name in names if not _is_file(index.parent / name)]:
        raise UserError(
            f"{index} names {len(names)} files, of which {len(absent)} are missing ({absent[0]}); download them"
        )
    return [index.parent / name for name in names]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # as of a name that is too long
        return False
