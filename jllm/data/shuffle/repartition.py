"""Deals the files of all data sets in a folder to partitions of equal weight, without copying a byte.

`<folder>/<set>/<files>` becomes `<folder>/<id>-part-00000/<files>`, ...: partition k holds block k, k+n, ... of every
set (`dealing.py` says when another). The new tree is built of hard links beside the old one, in
`.<folder>.parting.tmp`, and takes the folder's place by two renames; the old tree waits in `.<folder>.parted.tmp` until
then. A run killed at any moment leaves one of the two complete, and the next run finishes; run again when done, it
changes nothing. Files in the folder that belong to no data set are kept where they are.

Cost: a footer read and a link for each file. The folder's file system must know hard links.
"""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from jllm import atomic
from jllm.data.dataset.further import common
from jllm.data.dataset.manifest import (
    JOINED,
    MANIFEST_NAME,
    DataSet,
    FileEntry,
    Manifest,
    data_sets_below,
    inherited,
    one_tokenizer,
    read_manifest,
    sets_in,
    write_manifest,
)
from jllm.data.shuffle.dealing import deal
from jllm.errors import UserError

COMMAND = "repartition"
INFO_NAME = "_data.info"
OLD_INFO_NAME = "data.info"
"""What it was called before; pyarrow takes a file of this name for a shard."""
SHUFFLES = ("shuffle_datasets", "spark_jobs/shuffle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DealtBlock:
    """One file of one data set. `path` is relative to the folder; `name` is what it is called in its partition."""

    set_name: str
    index: int
    path: str
    name: str
    entry: FileEntry


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartitionPlan:
    """Which block goes to which partition.

    `sets` are the names and fingerprints of the sets, in order; `notes` are lines about what they do not share.
    """

    id: str
    sets: tuple[dict[str, Any], ...]
    partitions: tuple[tuple[DealtBlock, ...], ...]
    manifest: Manifest
    notes: tuple[str, ...]

    def info(self, name: str) -> str:
        """`_data.info`: the plan for people."""
        files = sum(len(blocks) for blocks in self.partitions)
        lines = [
            f"Source:      {name} ({', '.join(source['name'] for source in self.sets)})",
            f"Partitions:  {len(self.partitions)}",
            f"Files:       {files}",
            f"Samples:     {self.manifest.rows} x {_known(self.manifest.longest_row)}",
            f"Tokens:      {_known(self.manifest.total('tokens'))}",
            f"Id:          {self.id}",
            "",
            "partition                   files        samples           tokens          bytes",
        ]
        for index, blocks in enumerate(self.partitions):
            tokens = [block.entry.tokens for block in blocks]
            total = None if None in tokens else sum(value or 0 for value in tokens)
            rows, size = sum(block.entry.rows for block in blocks), sum(block.entry.bytes for block in blocks)
            lines.append(
                f"{_partition_name(self.id, index):<26}{len(blocks):>7}{rows:>15}{_known(total):>17}{size:>15}"
            )
        return "\n".join(lines) + "\n"


def _known(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _partition_name(identity: str, index: int) -> str:
    return f"{identity}-part-{index:05d}"


def recover(folder: Path) -> None:
    """Bring back a folder whose swap was cut off, and remove what a killed run left beside it."""
    parting, parted = _beside(folder)
    if parted.exists() and not folder.exists():
        os.rename(parting if parting.exists() else parted, folder)
    shutil.rmtree(parting, ignore_errors=True)
    shutil.rmtree(parted, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    names = [f".{folder.name}.{state}{atomic.TEMPORARY_SUFFIX}" for state in ("parting", "parted")]
    return folder.with_name(names[0]), folder.with_name(names[1])


def make_plan(folder: Path, partitions: int | None, partition_tokens: int | None) -> PartitionPlan:
    """Deal the blocks of all data sets of `folder` to `partitions`, or to partitions of about `partition_tokens`.

    Raises:
        UserError: no data, fewer blocks than partitions, or tokens that nobody counted.
    """
    sets = data_sets_below(folder)
    one = sets[0].manifest if len(sets) == 1 else None
    if one is not None and one.command == COMMAND:
        names, blocks = _blocks_of_dealt(one)
    else:
        names, blocks = _blocks_of_sets(folder, sets)
    if partitions is None:
        assert partition_tokens is not None
        partitions = _partitions_by_tokens(folder, blocks, partition_tokens)
    most = max(sum(block.set_name == source["name"] for block in blocks) for source in names)
    if partitions > most:
        raise UserError(
            f"{folder}: {partitions} partitions, but no data set has more than {most} files, so some would be empty;"
            f" ask for at most {most}, or shuffle with --num_block {partitions}"
        )
    further = common({data_set.name: data_set.manifest.further for data_set in sets})
    uneven = sorted({name for data_set in sets for name in data_set.manifest.further.types} - further.types.keys())
    identity = hashlib.sha256("".join(source["fingerprint"] for source in names).encode()).hexdigest()[:8]
    place = {source["name"]: number for number, source in enumerate(names)}
    blocks = sorted(blocks, key=lambda block: (place[block.set_name], block.index))
    keys = [(block.set_name, block.index) for block in blocks]
    dealing = deal(keys, [block.entry.tokens for block in blocks], partitions)
    dealt = tuple(
        tuple(sorted((blocks[at] for at in part), key=lambda block: (block.index, block.set_name)))
        for part in dealing.parts
    )
    manifest = Manifest(
        command=COMMAND,
        options={"partitions": partitions},
        files=tuple(
            dataclasses.replace(block.entry, path=f"{_partition_name(identity, k)}/{block.name}")
            for k, partition in enumerate(dealt)
            for block in partition
        ),
        tokenizer=one_tokenizer(sets),
        sources=names,
        further=further,
        labels_checked=all(data_set.manifest.labels_checked for data_set in sets),
        **inherited(sets),
        extra={
            "id": identity,
            "blocks": [[block.set_name, block.index] for partition in dealt for block in partition],
        },
    )
    notes = [f"column {name} is not the same in all sets: {further.left_out[name]}" for name in uneven]
    notes += [_unshuffled(source) for source in names if not _makers(source) <= {*SHUFFLES}]
    if len({data_set.manifest.chat_template for data_set in sets} - {None}) > 1:
        notes.append("the sets were made with different chat templates, so that what is trained on them exports none")
    if dealing.note is not None:
        notes.append(dealing.note)
    return PartitionPlan(id=identity, sets=names, partitions=dealt, manifest=manifest, notes=tuple(notes))


def _makers(source: dict[str, Any]) -> set[str]:
    """The commands that made a set, or its parts where none made the whole; "" is what nobody knows."""
    made_by = source.get("made_by", {"command": ""})
    return {*made_by.get("parts", [made_by["command"]])}


def _unshuffled(source: dict[str, Any]) -> str:
    makers = ", ".join(sorted(_makers(source) - {""})) or "an unknown program"
    return (
        f"data set {source['name']} was never shuffled, as far as is known (made by {makers}), so that partitions have"
        " its rows in their old order; shuffle first: python -m jllm.shuffle_datasets"
    )


def _blocks_of_sets(folder: Path, sets: Sequence[DataSet]) -> tuple[tuple[dict[str, Any], ...], list[DealtBlock]]:
    names: list[dict[str, Any]] = []
    blocks: list[DealtBlock] = []
    base_names = [Path(entry.path).name for data_set in sets for entry in data_set.manifest.files]
    unique = len(set(base_names)) == len(base_names)
    for data_set in sets:
        inside = data_set.folder if data_set.folder.is_relative_to(folder) else data_set.folder.resolve()
        prefix = inside.relative_to(folder if inside is data_set.folder else folder.resolve()).as_posix()
        names.append(_origin(data_set))
        for index, entry in enumerate(data_set.manifest.files):
            base = Path(entry.path).name
            name = base if unique else f"{data_set.name}-{index:05d}-{base}"
            path = entry.path if prefix == "." else f"{prefix}/{entry.path}"
            blocks.append(DealtBlock(set_name=data_set.name, index=index, path=path, name=name, entry=entry))
    return tuple(names), blocks


def _origin(data_set: DataSet) -> dict[str, Any]:
    """What the manifest says of a set it takes in; the set's own manifest goes."""
    manifest = data_set.manifest
    return {
        "name": data_set.name,
        "fingerprint": manifest.fingerprint,
        "rows": manifest.rows,
        "tokens": manifest.total("tokens"),
        "made_by": {
            "command": manifest.command,
            "options": manifest.options,
            **({"parts": _commands_of_parts(data_set)} if manifest.command == JOINED else {}),
        },
        "sources": list(manifest.sources),
        **({"mix": manifest.extra["mix"]} if "mix" in manifest.extra else {}),
    }


def _commands_of_parts(data_set: DataSet) -> list[str]:
    """The commands that made the sets in a folder without a manifest; "" stands for shards that are in none."""
    parts = sets_in(data_set.folder)
    described = sum(len(manifest.files) for manifest in parts.values())
    unknown = [""] if described < len(data_set.manifest.files) else []
    return sorted({*(manifest.command for manifest in parts.values()), *unknown})


def _blocks_of_dealt(manifest: Manifest) -> tuple[tuple[dict[str, Any], ...], list[DealtBlock]]:
    """The blocks of a folder that was dealt before, to deal them again."""
    blocks = [
        DealtBlock(set_name=name, index=index, path=entry.path, name=Path(entry.path).name, entry=entry)
        for entry, (name, index) in zip(manifest.files, manifest.extra["blocks"], strict=True)
    ]
    return manifest.sources, blocks


def _partitions_by_tokens(folder: Path, blocks: Sequence[DealtBlock], partition_tokens: int) -> int:
    counts = [block.entry.tokens for block in blocks]
    if None in counts:
        raise UserError(
            f"{folder}: the tokens of some files are not known; count them: jllm manifest --force on their data set"
        )
    return max(1, round(sum(count or 0 for count in counts) / partition_tokens))


def repartition(folder: Path, plan: PartitionPlan) -> bool:
    """Put the plan into effect; False where the folder is so already."""
    present = read_manifest(folder)
    if present is not None and present.to_json() == plan.manifest.to_json():
        if (folder / OLD_INFO_NAME).is_file():
            os.rename(folder / OLD_INFO_NAME, folder / INFO_NAME)
        return False
    parting, parted = _beside(folder)
    for place, _, _ in atomic.walk(folder):
        if not os.access(place, os.W_OK | os.X_OK, effective_ids=True):
            raise UserError(f"{place}: must be writable: its files get another place; allow that")
    parting.mkdir()
    earlier = {INFO_NAME, OLD_INFO_NAME} if present is not None and present.command == COMMAND else {INFO_NAME}
    _link_others(folder, parting, {block.path for blocks in plan.partitions for block in blocks} | earlier)
    try:
        for index, blocks in enumerate(plan.partitions):
            place = parting / _partition_name(plan.id, index)
            place.mkdir()
            for block in blocks:
                _link(folder / block.path, place / block.name, folder)
            atomic.sync_file(place)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot make hard links there ({error.strerror}); use a file system that can"
        ) from None
    atomic.write_text(parting / INFO_NAME, plan.info(folder.name))
    write_manifest(parting, plan.manifest)
    atomic.sync_file(parting)
    os.rename(folder, parted)
    os.rename(parting, folder)
    atomic.sync_file(folder.parent)
    shutil.rmtree(parted)
    return True


def _link_others(folder: Path, parting: Path, ours: Collection[str]) -> None:
    """Link what belongs to no data set, and is none of `ours` in the folder, into the new tree, at the same place."""
    for parent, _, files in atomic.walk(folder):
        for name in files:
            path = parent / name
            inside = path.relative_to(folder)
            known = inside.as_posix() in ours or name == MANIFEST_NAME
            if known or name.endswith((".crc", atomic.TEMPORARY_SUFFIX)) or name == "_SUCCESS":
                continue
            (parting / inside.parent).mkdir(parents=True, exist_ok=True)
            _link(path, parting / inside, folder)


def _link(source: Path, target: Path, folder: Path) -> None:
    """Give a file of the folder another name in the new tree, which holds when the old one is gone.

    Links lead where they led; one that leads within the folder becomes the file that it led to.

    Raises:
        OSError: a link leads to nothing, or the file system knows no hard links.
    """
    if not source.is_symlink():
        os.link(source, target)
        return
    found = source.resolve(strict=True)
    if found.is_relative_to(folder.resolve()):
        os.link(found, target)
    else:
        target.symlink_to(found)
