"""The folders of a run are its own: locked while it goes on, and never another run's.

A run writes to `--checkpoint` and to its log folder. It holds a lock on both (`jllm.train.lifecycle.run_lock`), on
every node that has folders of its own. Checkpoints and records that are there already are those of the run that goes on
from them; a new run is refused, because it would overwrite the records, and its retention would remove the checkpoints.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from jllm.errors import EXIT_CODE, UserError, report
from jllm.train.checkpoint.folders import ADAPTER_MARKER, INDEX_NAME, MODEL_MARKER, list_checkpoints
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement
from jllm.train.lifecycle.run_lock import RunLock
from jllm.train.records.metrics_file import METRICS_NAME, run_of_records

AUTO = "auto"
"""The `--resume_ckpt` that finds out by itself."""


def folders_of(config: TrainConfig) -> list[Path]:
    """The folders that a run writes to while it goes on, none inside another."""
    found: list[Path] = []
    for folder in (config.checkpoint, config.resolved_log_dir):
        if folder is not None and not any(folder.resolve().is_relative_to(other.resolve()) for other in found):
            found.append(folder)
    return found


@contextlib.contextmanager
def locked(config: TrainConfig, agreement: Agreement, run: str) -> Iterator[None]:
    """Hold the folders of the run with this id; every process calls it.

    Raises:
        UserError: on every process: another run holds one, or one cannot be written to.
    """
    with contextlib.ExitStack() as held:
        for folder in folders_of(config):

            def take(folder: Path = folder) -> str | None:
                lock = RunLock(folder, run, lost=_end)
                try:
                    # The line that starts a run again waits for what is left of the run before; others are mistakes.
                    lock.take(wait=config.lock_wait if config.resume_ckpt == AUTO else 0, say=print)
                except UserError as error:
                    return str(error)
                held.callback(lock.release)
                return None

            holds = agreement.is_first_of_node if not agreement.sees_one_folder(folder) else agreement.place.is_first
            mistake = agreement.gather_first(lambda holds=holds, take=take: take() if holds else None)  # type: ignore[misc]
            if mistake is not None:
                raise UserError(mistake)
        yield


def _end(why: str) -> None:
    report(f"this run ends: {why}")
    os._exit(EXIT_CODE)


def run_id(config: TrainConfig) -> str:
    """The id of the run that `--resume_ckpt` goes on with: of its checkpoint or, where there is none, of the records
    that it goes on in; otherwise a new one."""
    known = _id_of_checkpoints(config)
    records = _records_of(config)
    if not known and config.resume_ckpt is not None and records is not None:
        known = run_of_records(records)
    return known or uuid.uuid4().hex[:16]


def _id_of_checkpoints(config: TrainConfig) -> str | None:
    known = [run_id_of(folder) for folder in reversed(_given_checkpoints(config))]
    return next((found for found in known if found is not None), None)


def _records_of(config: TrainConfig) -> Path | None:
    return None if config.resolved_log_dir is None else config.resolved_log_dir / METRICS_NAME


def run_id_of(folder: Path) -> str | None:
    """The id of the run that made a checkpoint, "" for one from before there were ids; None where nobody can tell."""
    with contextlib.suppress(UserError):
        return CheckpointReader(folder).state.run
    return None


def _given_checkpoints(config: TrainConfig) -> list[Path]:
    """The checkpoints that `--resume_ckpt` may mean, oldest first."""
    if config.resume_ckpt is None:
        return []
    if config.resume_ckpt == AUTO:
        return list_checkpoints(config.checkpoint) if config.checkpoint is not None else []
    given = Path(config.resume_ckpt) / config.tag if config.tag is not None else Path(config.resume_ckpt)
    return [given] if (given / INDEX_NAME).is_file() else list_checkpoints(given)


def check_folders_are_free(config: TrainConfig) -> None:
    """Refuse a run where another one's checkpoints or records are.

    Raises:
        UserError: there are some, with the ways out.
    """
    if config.clean:
        return
    go_on = "--resume_ckpt auto to go on with it, " if config.checkpoint is not None else ""
    ways_out = f"give {go_on}--clean to start over, or another folder"
    if config.checkpoint is not None and config.resume_ckpt != AUTO:
        exported = (MODEL_MARKER, ADAPTER_MARKER)
        found = [path for marker in exported for path in list_checkpoints(config.checkpoint, marker=marker)]
        found += list_checkpoints(config.checkpoint)
        if found and (config.resume_ckpt is None or run_id_of(found[-1]) not in (None, run_id(config))):
            raise UserError(f"--checkpoint {config.checkpoint} holds {found[-1].name} of another run: {ways_out}")
    records = _records_of(config)
    if records is None or not records.is_file() or not records.stat().st_size:
        return
    if config.resume_ckpt is None:
        raise UserError(f"{records} holds the records of another run: {ways_out}")
    known, recorded = _id_of_checkpoints(config), run_of_records(records)
    if known and recorded and known != recorded:
        raise UserError(
            f"{records} holds the records of another run ({recorded}) than --resume_ckpt {config.resume_ckpt} goes on"
            f" with ({known}): give another --log_dir"
        )


def check_model_folders(config: TrainConfig, agreement: Agreement) -> None:
    """See to it that the stages of a model are written to one folder; every process calls it.

    Raises:
        UserError: they are on several nodes, and what they write would not come together.
    """
    nodes = agreement.gather(agreement.node)
    if len({nodes[rank] for rank in agreement.mesh.writers}) == 1:
        return
    model_only = config.checkpoint if config.only_exports else None
    for name, folder in (("--output_dir", config.output_dir), ("--checkpoint", model_only)):
        if folder is not None and not agreement.sees_one_folder(folder):
            raise UserError(
                f"{name} {folder} is another folder on each node, and each would get a part of the model; give one"
                " that all nodes share"
            )
