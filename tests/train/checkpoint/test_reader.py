"""Any region is read from whatever files hold its elements; what no file holds is missed by name."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.errors import UserError
from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.format import write_index
from jllm.train.checkpoint.reader import CheckpointReader, DamagedCheckpointError
from jllm.train.checkpoint.regions import Region
from tests.train.checkpoint.layouts import regions, tilings
from tests.train.checkpoint.written import elements, state_of, whole_tensor, write_checkpoint


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_region_from_any_layout(data: st.DataObject) -> None:
    """Written by ranks that cut the tensor in one way, read by ranks that cut it in another."""
    tiling = data.draw(tilings())
    shape = tiling[0].shape
    files: list[list[Region]] = [[] for _ in range(data.draw(st.integers(1, 4)))]
    for number, region in enumerate(tiling):
        files[data.draw(st.integers(0, len(files) - 1)) if number else 0].append(region)
    wanted = data.draw(regions(shape))
    with tempfile.TemporaryDirectory() as root:
        reader = CheckpointReader(write_checkpoint(Path(root), files))
        assert reader.shape("weight", "w") == shape
        assert reader.names("weight") == {"w"}
        found = reader.read("weight", "w", wanted)
        assert found is not None
        assert torch.equal(found, elements(wanted))
        assert reader.read("master", "w", wanted) is None
        assert reader.state == state_of(3)
        assert [reader.rng(rank)["cpu"].item() for rank in range(len(files))] == list(range(len(files)))
        assert reader.rng(len(files)) == {}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_elements_that_no_file_holds_are_counted(data: st.DataObject) -> None:
    tiling = data.draw(tilings())
    held = [region for region in tiling if data.draw(st.booleans())]
    if not held:
        return
    whole = Region.of(tiling[0].shape)
    have, need = sum(region.size for region in held), whole.size
    with tempfile.TemporaryDirectory() as root:
        reader = CheckpointReader(write_checkpoint(Path(root), [held]))
        if have == need:
            reader.read("weight", "w", whole)
            return
        with pytest.raises(UserError, match=f"weight/w has {have} of the {need} elements"):
            reader.read("weight", "w", whole)


def test_parts_may_overlap(tmp_path: Path) -> None:
    """Each node of a run with a folder of its own may have written the same elements."""
    whole = Region.of((4, 3))
    held = [[whole.run(0, 8)], [whole.run(5, 12)], [whole]]
    with pytest.raises(UserError, match="8 of the 12"):
        CheckpointReader(write_checkpoint(tmp_path / "1", held[:1])).read("weight", "w", whole)
    for number in (2, 3):
        found = CheckpointReader(write_checkpoint(tmp_path / str(number), held[:number])).read("weight", "w", whole)
        assert torch.equal(found, whole_tensor((4, 3)).reshape(-1))  # type: ignore[arg-type]


def as_format_1(folder: Path) -> None:
    """Rewrite an index as the first version wrote it: runs of the whole tensor under the tensor's own key."""
    index = json.loads((folder / INDEX_NAME).read_text())
    index["format"] = 1
    del index["files"], index["checksum"]
    for entry in index["tensors"].values():
        entry["parts"] = [{name: part[name] for name in ("file", "start", "stop")} for part in entry["parts"]]
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("wanted", [Region.of((5, 4)), Region.of((5, 4), start=3, stop=13)])
def test_format_1_is_read(tmp_path: Path, wanted: Region) -> None:
    folder = write_checkpoint(tmp_path, [[Region.of((5, 4), start=0, stop=7)], [Region.of((5, 4), start=7, stop=20)]])
    as_format_1(folder)
    reader = CheckpointReader(folder)
    assert torch.equal(reader.read("weight", "w", wanted), elements(wanted))  # type: ignore[arg-type]
    assert dataclasses.asdict(reader.state) == dataclasses.asdict(state_of(3))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, [[Region.of((2,))]])
    index = json.loads((folder / INDEX_NAME).read_text())
    write_index(folder, {**index, "format": 3})
    with pytest.raises(UserError, match="checkpoint format 3; this version reads 1 and 2"):
        CheckpointReader(folder)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_flipped_bit_is_found(data: st.DataObject) -> None:
    """Whatever byte of whatever file is another one, reading everything says so, and names the file."""
    with tempfile.TemporaryDirectory() as root:
        whole = Region.of((3, 4))
        folder = write_checkpoint(Path(root), [[whole.run(0, 5)], [whole.run(5, 12)]])
        assert CheckpointReader(folder).check_all() == []
        path = data.draw(st.sampled_from(sorted(folder.iterdir())))
        written = path.read_bytes()
        content = bytearray(written)
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        try:
            problems = CheckpointReader(folder).check_all()
        except DamagedCheckpointError as error:
            problems = [str(error)]
        # White space between the values of the index says nothing.
        assert problems or (path.name == INDEX_NAME and json.loads(content) == json.loads(written))
        assert all(path.name in problem for problem in problems)


def test_damage_is_found_by_who_reads_it_alone(tmp_path: Path) -> None:
    whole = Region.of((3, 4))
    folder = write_checkpoint(tmp_path, [[whole.run(0, 5)], [whole.run(5, 12)]])
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the state of the random numbers, or of the piece
    path.write_bytes(content)
    reader = CheckpointReader(folder)
    assert reader.read("weight", "w", whole.run(1, 4)) is not None
    with pytest.raises(DamagedCheckpointError, match=r"rank-00001\.safetensors: is damaged"):
        reader.read("weight", "w", whole.run(4, 8))


def test_a_damaged_index_or_file_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, [[Region.of((2,))]])
    (folder / "rank-00000.safetensors").write_bytes(b"\0" * 4)
    with pytest.raises(UserError, match=r"rank-00000\.safetensors: is damaged: it has 4 bytes"):
        CheckpointReader(folder).read("weight", "w", Region.of((2,)))
    (folder / INDEX_NAME).write_text("{")
    with pytest.raises(UserError, match=r"index\.json: cannot be read"):
        CheckpointReader(folder)
