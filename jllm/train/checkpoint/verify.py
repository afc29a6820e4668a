"""Checkpoints looked at from outside a run: what they are, and whether every byte is what was written.

Cost: `describe` reads the index; `verify` reads every file once.
"""

from pathlib import Path

from jllm.errors import UserError
from jllm.train.checkpoint.folders import INDEX_NAME, list_checkpoints
from jllm.train.checkpoint.reader import CheckpointReader, DamagedCheckpointError


def find(folder: Path) -> list[Path]:
    """The complete checkpoints that a user means: `folder` itself, or all in it, oldest first.

    Raises:
        UserError: there is none.
    """
    if (folder / INDEX_NAME).is_file():
        return [folder]
    found = list_checkpoints(folder)
    if not found:
        raise UserError(f"{folder}: no complete checkpoint there; give the folder that --checkpoint named")
    return found


def describe(folder: Path) -> str:
    """A line about a checkpoint, for people."""
    try:
        reader = CheckpointReader(folder)
    except DamagedCheckpointError as error:
        return str(error)
    state = reader.state
    size = sum(path.stat().st_size for path in folder.iterdir())
    loss = "not evaluated" if state.eval_loss is None else f"evaluation loss {state.eval_loss:.4f}"
    checksums = "with checksums" if reader.has_checksums else "without checksums (format 1)"
    return (
        f"{folder.name}: after step {state.step:,}, {state.consumed_tokens:,} tokens, {loss}; {size / 1e9:,.2f} GB,"
        f" {checksums}"
    )


def verify(folder: Path) -> list[str]:
    """What is damaged in a checkpoint, a line each; nothing where every byte is what was written.

    Raises:
        UserError: the checkpoint has no checksums, so nothing can be said.
    """
    try:
        reader = CheckpointReader(folder)
    except DamagedCheckpointError as error:
        return [str(error)]
    if not reader.has_checksums:
        raise UserError(f"{folder} has no checksums: it is of format 1, which has none; nothing can be verified")
    return reader.check_all()
