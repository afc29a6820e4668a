"""What is on disk: an index that says where every element is, and what its bytes were."""

import json
import zlib
from pathlib import Path

import pytest
from safetensors import safe_open

from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.format import checksum_of_index
from jllm.train.checkpoint.regions import Region
from tests.train.checkpoint.written import elements, write_checkpoint

WHOLE = Region.of((4, 6))
COLUMNS = [Region.of((4, 6), offset=(0, begin), extent=(4, 2)) for begin in (0, 2, 4)]


def index_of(folder: Path) -> dict[str, object]:
    index: dict[str, object] = json.loads((folder / INDEX_NAME).read_text())
    return index


@pytest.mark.parametrize("files", [[[WHOLE]], [COLUMNS], [[WHOLE.run(0, 7)], [WHOLE.run(7, 24)]]])
def test_every_part_is_where_the_index_says(tmp_path: Path, files: list[list[Region]]) -> None:
    """Also where a file has several regions of one tensor, as packed projections have."""
    folder = write_checkpoint(tmp_path, files)
    entry = index_of(folder)["tensors"]["weight/w"]  # type: ignore[index]
    assert entry["shape"] == [4, 6]
    assert len(entry["parts"]) == sum(map(len, files))
    for part in entry["parts"]:
        with safe_open(folder / part["file"], framework="pt") as file:
            assert file.get_tensor(part["key"]).equal(elements(Region.from_json(entry["shape"], part)))


def test_equal_parts_of_several_nodes_are_there_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, [[WHOLE], [WHOLE], [WHOLE.run(0, 7)]])
    parts = index_of(folder)["tensors"]["weight/w"]["parts"]  # type: ignore[index]
    assert [(part["file"][:10], part["start"], part["stop"]) for part in parts] == [
        ("rank-00000", 0, 24),
        ("rank-00002", 0, 7),
    ]


def test_checksums_are_those_of_the_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, [[WHOLE.run(0, 7)], [WHOLE.run(7, 24)]])
    index = index_of(folder)
    assert sorted(index["files"]) == ["rank-00000.safetensors", "rank-00001.safetensors"]  # type: ignore[call-overload]
    for name, said in index["files"].items():  # type: ignore[attr-defined]
        content = (folder / name).read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        assert said["bytes"] == len(content)
        assert said["header"] == zlib.crc32(content[:length])
        assert set(said["tensors"]) == set(header) - {"__metadata__"}
        for key, checksum in said["tensors"].items():
            begin, end = header[key]["data_offsets"]
            assert checksum == zlib.crc32(content[length + begin : length + end])
    assert index["checksum"] == checksum_of_index(index)
    assert sorted(path.name for path in folder.iterdir()) == [INDEX_NAME, *index["files"]]  # type: ignore[misc]
