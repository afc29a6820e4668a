"""Exact global shuffle of a data set's rows, in memory or out of core.

`shuffle_set` deals a uniform permutation of all rows to `blocks` files. Row i of the data set goes to position
`destinations(...)[i]` of the output, a pure function of the data's fingerprint, the seed and the number of rows: not of
the number of workers, of the memory cap, or of what an earlier, killed run left. Block k holds positions
`[k·rows/blocks, (k+1)·rows/blocks)`.

Two passes. The first reads every input file once, row group by row group, and throws rows into buckets, which are
ranges of positions (`scatter.py`), packed to 2 or 3 bytes a token (`compact.py`); where they exceed the cap they go
to disk. The second orders each bucket and writes the blocks. Blocks are finished one by one: a killed run's blocks are
kept and only the rows of the others are thrown again.

Every input file is hashed as it is first reached, and one that is not what its manifest says ends the run before a
block is written.

Cost: every row is decoded once and encoded once, and copied three times in between; 4 bytes of memory a row for the
permutation, and the cap for everything else.
"""

import contextlib
import dataclasses
import fcntl
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from jllm import atomic
from jllm.data.dataset.manifest import (
    MANIFEST_NAME,
    DataSet,
    Manifest,
    inherited,
    open_data_set,
    read_manifest,
    write_manifest,
)
from jllm.data.shuffle.mix import ALL_ONCE, Recipe, select_rows
from jllm.data.shuffle.passes import SCRATCH_NAME, Passes
from jllm.data.shuffle.passes import Resources as Resources
from jllm.errors import UserError, say

COMMAND = "shuffle_datasets"
PLAN_NAME = ".plan.json"
CLEANED = {"cleaned": True}
"""The plan of a folder in which `clean` left what is not ours: a shuffle may begin there, as in an empty one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one data set. `blocks_kept` were there already; `source_tags` were found in its rows."""

    folder: Path
    manifest: Manifest
    blocks_kept: int
    source_tags: frozenset[str] | None = None


def shuffle_set(
    data_set: DataSet,
    folder: Path,
    *,
    blocks: int,
    seed: int,
    resources: Resources,
    recipe: Recipe = ALL_ONCE,
    warn: Callable[[str], None] = say,
) -> Outcome:
    """Shuffle a data set, or what `recipe` takes of it, into `folder`; finish what a killed run began; or find it done.

    `warn` hears of columns that cannot travel with their rows, before any work is done.

    Raises:
        UserError: the folder holds something else, the disk is too small, or an input file is damaged.
    """
    options: dict[str, Any] = {"seed": seed, "blocks": blocks}
    if recipe != ALL_ONCE:
        options["mix"] = recipe.to_json()
    plan = {"fingerprint": data_set.manifest.fingerprint, **options}
    done = _finished(folder, plan)
    if done is not None:
        return Outcome(folder=folder, manifest=done, blocks_kept=blocks)
    _refuse_other_work(folder, plan)
    selection = select_rows(data_set, recipe, seed=seed, cores=resources.cores)
    job = Passes(data_set, folder, blocks=blocks, seed=seed, resources=resources, copies=selection.copies)
    job.check_disk()
    for line in job.further.warnings():
        warn(f"warning: {data_set.name}: {line}")
    with _held(folder, plan):
        try:
            kept = job.run()
        except UserError:
            if not job.entries:
                _leave_nothing(folder)
            raise
    manifest = Manifest(
        command=COMMAND,
        options=options,
        files=tuple(job.entries[block] for block in range(blocks)),
        tokenizer=data_set.manifest.tokenizer,
        sources=({"name": data_set.name, "fingerprint": data_set.manifest.fingerprint},),
        further=job.further,
        labels_checked=True,
        **inherited([data_set]),
    )
    write_manifest(folder, manifest)
    clear_traces(folder)
    return Outcome(folder=folder, manifest=manifest, blocks_kept=kept, source_tags=selection.source_tags)


def _finished(folder: Path, plan: dict[str, Any]) -> Manifest | None:
    manifest = read_manifest(folder)
    if manifest is None:
        return None
    refuse_other_result(folder, manifest, plan, COMMAND)
    open_data_set(folder)  # refuses files that are missing or changed
    clear_traces(folder)
    return manifest


def refuse_other_result(folder: object, manifest: Manifest, plan: dict[str, Any], command: str) -> None:
    """Raises:
    UserError: a finished folder holds something else than `command` makes by the plan.
    """
    made = {"fingerprint": manifest.sources[0].get("fingerprint") if manifest.sources else None, **manifest.options}
    if manifest.command != command or made != plan:
        raise UserError(
            f"{folder}: holds the result of {manifest.command} with {_said(made)}, not {_said(plan)};"
            " give --clean to make it anew, or another --output"
        )


def refuse_other_plan(folder: object, found: object, plan: dict[str, Any]) -> None:
    """Raises:
    UserError: what is unfinished in a folder goes by another plan.
    """
    if found != plan:
        raise UserError(
            f"{folder}: holds an unfinished shuffle of other data or with other options; give --clean to start"
            " over, or another --output"
        )


def not_empty(folder: object) -> UserError:
    return UserError(f"{folder}: is not empty and not made by this command; remove it, or give another --output")


def refuse_place(shown: object, output: PurePath, source: PurePath) -> None:
    """Raises:
    UserError: an output folder, given as `shown`, lies where the input is.
    """
    if output == source or source in output.parents:
        raise UserError(f"--output {shown}: lies in the input folder; give a folder beside it")


def _said(plan: dict[str, Any]) -> str:
    plan = {key: value for key, value in plan.items() if key != "mix"} | ({"a mix": ""} if "mix" in plan else {})
    short = {key: value[:8] if isinstance(value, str) else value for key, value in plan.items()}
    return ", ".join(f"{key} {value}" for key, value in short.items())


def _refuse_other_work(folder: Path, plan: dict[str, Any]) -> None:
    if _is_cleaned(folder):
        return
    path = folder / PLAN_NAME
    if path.is_file():
        refuse_other_plan(folder, atomic.read_object(path, "give --clean to start over, or another --output"), plan)
    elif folder.exists() and any(name != atomic.temporary_name(path) for name in folder.iterdir()):
        raise not_empty(folder)


@contextlib.contextmanager
def _held(folder: Path, plan: dict[str, Any]) -> Iterator[None]:
    """Record the plan and keep other runs out of the folder; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN_NAME).is_file() or _is_cleaned(folder):
        atomic.write_json(folder / PLAN_NAME, plan)
    with _locked(folder):
        atomic.remove_temporaries(folder)
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that has a plan.

    Raises:
        UserError: another run has it.
    """
    with (folder / PLAN_NAME).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is at work there; wait for it, or end it") from None
        yield


def _is_cleaned(folder: Path) -> bool:
    return atomic.read_object(folder / PLAN_NAME, "give --clean to start over, or another --output") == CLEANED


def clear_traces(folder: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(folder / SCRATCH_NAME, ignore_errors=True)
    for path in _block_files(folder, records_only=True):
        path.unlink()
    (folder / PLAN_NAME).unlink(missing_ok=True)
    atomic.remove_temporaries(folder)


def _block_files(folder: Path, *, records_only: bool = False) -> list[Path]:
    """The blocks in a folder, and the hidden records that unfinished runs keep of them, by their names."""
    block = re.compile(rf"{re.escape(folder.name)}-\d{{5,}}\.\w+\.parquet")
    records = [path for path in folder.glob(".*.json") if block.fullmatch(path.name[1:].removesuffix(".json"))]
    blocks = [path for path in folder.glob("*.parquet") if block.fullmatch(path.name)]
    return records if records_only else [*records, *blocks]


def _leave_nothing(folder: Path) -> None:
    """Take away what a run made that ends before its first block."""
    clear_traces(folder)
    for place in (folder, folder.parent):
        if any(place.iterdir()):
            break
        place.rmdir()


def clean(folder: Path) -> None:
    """Remove an earlier run's result, finished or not; anything else in the folder stays.

    Raises:
        UserError: the folder holds another command's result, or a run is at work there.
    """
    manifest = read_manifest(folder)
    plan = folder / PLAN_NAME
    if manifest is None and not plan.is_file():
        return
    if folder.is_symlink():
        raise UserError(f"{folder}: is a link, and nothing is removed through one; remove the link, or name its target")
    if manifest is not None and manifest.command != COMMAND:
        raise UserError(f"{folder}: holds the result of {manifest.command}; --clean removes only shuffled data")
    with _locked(folder) if plan.is_file() else contextlib.nullcontext():
        # An empty plan says whose folder this is, and is no one's plan, until all else is gone: a kill does no harm.
        atomic.write_json(plan, {})
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        for path in _block_files(folder):
            path.unlink()
        shutil.rmtree(folder / SCRATCH_NAME, ignore_errors=True)
        atomic.remove_temporaries(folder)
        if any(path != plan for path in folder.iterdir()):
            atomic.write_json(plan, CLEANED)
        else:
            plan.unlink()
            folder.rmdir()
