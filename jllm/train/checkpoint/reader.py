"""Reads elements of parameters from a complete checkpoint, of format 1 or 2, whatever files hold them.

What is read is compared with its checksum before it is used, once for each tensor of a file. A checkpoint of format 1
has none.

Cost: files are mapped; of each file only the tensors that are asked for are read. A region that one file holds in one
run is not copied twice.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from jllm import atomic
from jllm.errors import UserError
from jllm.guards import notation
from jllm.guards.typed import MALFORMED, check_fields
from jllm.train.checkpoint.folders import INDEX_NAME, rank_file_name
from jllm.train.checkpoint.format import (
    CHECKSUM,
    READABLE_VERSIONS,
    RNG_PREFIX,
    RunState,
    checksum_of_index,
    tensor_key,
)
from jllm.train.checkpoint.regions import Box, Region, strides
from jllm.train.data.loader import Cursor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _StoredBox:
    """A box of a tensor that lies in one run of a file.

    Attributes:
        file: its name.
        key: of the flat tensor in the file.
        place: of the box's first element in the flat tensor.
        box: which elements.
    """

    file: str
    key: str
    place: int
    box: Box


class DamagedCheckpointError(UserError):
    """What is on disk is not what was written: an earlier checkpoint may be good."""


class CheckpointReader:
    """See the module.

    Raises:
        DamagedCheckpointError: the index, or later a file, cannot be read or is not what was written.
        UserError: the checkpoint is of a format that this version does not know.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self._index = notation.read_json(folder / INDEX_NAME)
        except (OSError, ValueError) as error:
            raise self._damage(INDEX_NAME, f"cannot be read ({error})") from None
        if not isinstance(self._index, dict):
            raise self._damage(INDEX_NAME, "is no JSON object")
        if self._index.get("format") != 1 and self._index.get(CHECKSUM) != checksum_of_index(self._index):
            raise self._damage(INDEX_NAME, "is damaged: it is not what its checksum says")
        for name in self._named_files():
            if problem := atomic.plain_name(name):
                raise self._damage(INDEX_NAME, f"names a file that is none of the checkpoint's: {problem}")
        if self._index.get("format") not in READABLE_VERSIONS:
            given, known = self._index.get("format"), " and ".join(map(str, READABLE_VERSIONS))
            raise UserError(f"{folder}: checkpoint format {given!r}; this version reads {known}")
        try:
            self._check_index()
        except MALFORMED as error:
            raise self._damage(INDEX_NAME, f"is not what a run writes ({type(error).__name__}: {error})") from None
        self._files: dict[str, Any] = {}
        self._checked: set[tuple[str, str]] = set()

    def _check_index(self) -> None:
        """Raises:
        TypeError, ValueError and the like: something in the index is not what it must be.
        """
        check_fields(self.state)
        check_fields(self.state.cursor)
        for tensor, entry in self._index["tensors"].items():
            shape = entry["shape"]
            if not all(type(size) is int and 0 <= size < 1 << 48 for size in shape) or math.prod(shape) >= 1 << 60:
                raise ValueError(f"{tensor} has the shape {shape!r:.60}")
            for part in entry["parts"]:
                if not isinstance(part["file"], str) or not isinstance(part.get("key", tensor), str):
                    raise TypeError(f"a part of {tensor} has no name")
                region = Region.from_json(shape, part)
                bounds = (*region.offset, *region.extent, region.start, region.stop)
                if not all(type(each) is int and each >= 0 for each in bounds) or region.start > region.stop:
                    raise ValueError(f"a part of {tensor} lies nowhere")
                places = zip(region.offset, region.extent, shape, strict=True)
                inside = all(offset + extent <= size for offset, extent, size in places)
                if not inside or region.stop > math.prod(region.extent):
                    raise ValueError(f"a part of {tensor} lies outside of it")
        for name, sums in self._index.get("files", {}).items():
            if not isinstance(sums, dict) or not isinstance(sums["tensors"], dict):
                raise TypeError(f"{name} has no checksums")

    @property
    def state(self) -> RunState:
        names = [field.name for field in dataclasses.fields(RunState)]
        values = {name: self._index[name] for name in names if name in self._index}
        values["cursor"] = Cursor(**values["cursor"])
        return RunState(**values)

    def shape(self, kind: str, name: str) -> tuple[int, ...] | None:
        """The whole parameter's shape, or None where the checkpoint has no such tensor."""
        entry = self._index["tensors"].get(tensor_key(kind, name))
        return None if entry is None else tuple(entry["shape"])

    def names(self, kind: str) -> set[str]:
        """The parameters of which the checkpoint has this kind."""
        prefix = tensor_key(kind, "")
        return {key.removeprefix(prefix) for key in self._index["tensors"] if key.startswith(prefix)}

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """The kinds of tensors that it has."""
        return frozenset(key.partition("/")[0] for key in self._index["tensors"])

    def check(self, kind: str, name: str, region: Region) -> None:
        """Compare what `read` would read with its checksums.

        Raises:
            DamagedCheckpointError: something is not what was written.
        """
        tensor = tensor_key(kind, name)
        wanted = [box for _, box in region.boxes()]
        for stored in _stored_boxes(tensor, self._index["tensors"].get(tensor, {"parts": []})):
            if any(box.intersection(stored.box) for box in wanted):
                self._check_tensor(stored.file, stored.key)

    def read(self, kind: str, name: str, region: Region) -> Tensor | None:
        """The elements of `region`, flat; None where the checkpoint has none of that kind.

        Raises:
            UserError: some of them are in no file.
        """
        tensor = tensor_key(kind, name)
        entry = self._index["tensors"].get(tensor)
        if entry is None:
            return None
        stored = list(_stored_boxes(tensor, entry))
        wanted = list(region.boxes())
        if len(wanted) == 1:
            _, box = wanted[0]
            whole = next((each for each in stored if box.intersection(each.box) == box), None)
            if whole is not None:
                return self._load(whole, box).reshape(-1)
        found: Tensor | None = None
        missing = 0
        for place, box in wanted:
            left = [box]
            for each in stored:
                rest: list[Box] = []
                for hole in left:
                    common = hole.intersection(each.box)
                    if common is None:
                        rest.append(hole)
                        continue
                    content = self._load(each, common)
                    if found is None:
                        found = torch.empty(region.size, dtype=content.dtype)
                    target = found[place : place + box.size].view(box.extent)
                    target[common.within(box)] = content
                    rest += hole.without(common)
                left = rest
            missing += sum(hole.size for hole in left)
        if missing:
            raise UserError(
                f"{self.folder}: {tensor} has {region.size - missing} of the {region.size} elements that are needed;"
                " where each node wrote its own, go on with the same layout, or put the nodes' folders together"
            )
        return torch.empty(0) if found is None else found

    def rng(self, rank: int) -> dict[str, Tensor]:
        """The random-number states of process `rank`; empty where that process did not exist."""
        if not (self.folder / rank_file_name(rank)).is_file():
            return {}
        file = self._open(rank_file_name(rank))
        names = [key for key in file.keys() if key.startswith(RNG_PREFIX)]  # noqa: SIM118 (not a dict)
        for name in names:
            self._check_tensor(rank_file_name(rank), name)
        return {name.removeprefix(RNG_PREFIX): file.get_tensor(name) for name in names}

    def _load(self, stored: _StoredBox, box: Box) -> Tensor:
        """The elements of `box`, which lies within the stored one, in its shape."""
        steps = strides(stored.box.extent)
        first = sum(place.start * step for place, step in zip(box.within(stored.box), steps, strict=True))
        count = 1 + sum((length - 1) * step for length, step in zip(box.extent, steps, strict=True))
        begin = stored.place + first
        file = self._open(stored.file)
        self._check_tensor(stored.file, stored.key)
        try:
            flat: Tensor = file.get_slice(stored.key)[begin : begin + count]
            return flat.as_strided(box.extent, steps)
        except (SafetensorError, RuntimeError, *MALFORMED) as error:
            raise self._damage(stored.file, f"does not hold what the index says of {stored.key} ({error})") from None

    def _named_files(self) -> set[Any]:
        """All that the index says of where something lies; what has another shape names nothing."""
        entries = self._index.get("tensors")
        parts = [entry.get("parts") for entry in entries.values() if isinstance(entry, dict)] if isinstance(
            entries, dict) else []  # fmt: skip
        stored = [part for each in parts if isinstance(each, list) for part in each if isinstance(part, dict)]
        files = self._index.get("files")
        return {str(part.get("file", "")) for part in stored} | set(files if isinstance(files, dict) else ())

    def check_all(self) -> list[str]:
        """Read everything and compare it with its checksum: what is damaged, each on a line."""
        problems = []
        names = sorted({part["file"] for entry in self._index["tensors"].values() for part in entry["parts"]})
        for name in names:
            try:
                keys = list(self._open(name).keys())
            except DamagedCheckpointError as error:
                problems.append(str(error))
                continue
            for key in keys:
                try:
                    self._check_tensor(name, key)
                except DamagedCheckpointError as error:
                    problems.append(str(error))
        return problems

    @property
    def has_checksums(self) -> bool:
        """Whether damage can be found; a checkpoint of format 1 has no checksums."""
        return "files" in self._index

    def _open(self, name: str) -> Any:
        if name not in self._files:
            path = self.folder / name
            try:
                self._check_header(path)
                self._files[name] = safe_open(path, framework="pt")
            except DamagedCheckpointError:
                raise
            except Exception as error:  # safetensors raises its own kinds
                raise self._damage(name, f"cannot be read ({error})") from None
        return self._files[name]

    def _check_header(self, path: Path) -> None:
        expected = self._index.get("files", {}).get(path.name)
        if expected is None:
            return
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise self._damage(path.name, f"is damaged: it has {size:,} bytes and had {expected['bytes']:,}")
        with path.open("rb") as file:
            length = file.read(8)
            header = length + file.read(min(int.from_bytes(length, "little"), size))
        if zlib.crc32(header) != expected["header"]:
            raise self._damage(path.name, "is damaged: its header is not what its checksum says")

    def _check_tensor(self, name: str, key: str) -> None:
        expected = self._index.get("files", {}).get(name)
        if expected is None or (name, key) in self._checked:
            return
        try:
            content = self._open(name).get_tensor(key).reshape(-1).view(torch.uint8).numpy()
        except (SafetensorError, UnicodeError) as error:  # JSON has names that no file can have
            raise self._damage(name, f"does not hold what the index says of {key} ({error})") from None
        if zlib.crc32(content.data) != expected["tensors"].get(key):
            raise self._damage(name, f"is damaged: {key} is not what its checksum says")
        self._checked.add((name, key))

    def _damage(self, name: str, what: str) -> DamagedCheckpointError:
        return DamagedCheckpointError(f"{self.folder / name}: {what}")


def _stored_boxes(tensor: str, entry: dict[str, Any]) -> Iterator[_StoredBox]:
    """What the index says of one tensor; files of format 1 know a piece by the tensor's own key."""
    for part in entry["parts"]:
        for place, box in Region.from_json(entry["shape"], part).boxes():
            yield _StoredBox(file=part["file"], key=part.get("key", tensor), place=place, box=box)
