"""`jllm checkpoint`: what is there is listed, what is damaged is named, and what cannot be said is not said."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jllm.commands.checkpoint import main
from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.regions import Region
from tests.train.checkpoint.written import write_checkpoint

WHOLE = Region.of((3, 4))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, [[WHOLE.run(0, 5)], [WHOLE.run(5, 12)]], step=step)
    return tmp_path


def checkpoint(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def test_checkpoints_are_listed_by_step(root: Path) -> None:
    (root / ".step-00000011.tmp").mkdir()  # what is being written does not exist
    result = checkpoint("list", root)
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in result.output.splitlines()] == [
        "step-00000002",
        "step-00000009",
        "step-00000010",
    ]
    assert "after step 9, 5 tokens, not evaluated" in result.output
    assert checkpoint("list", root / "step-00000009").output.count("\n") == 1


def test_intact_checkpoints_are_said_to_be_so(root: Path) -> None:
    result = checkpoint("verify", root)
    assert result.exit_code == 0
    assert result.output.count("every byte is what was written") == 3


def test_all_damage_is_named_and_the_newest_good_one(root: Path) -> None:
    damage(root / "step-00000010/rank-00001.safetensors")
    damage(root / "step-00000010/rank-00000.safetensors")
    damage(root / "step-00000002/rank-00000.safetensors")
    result = checkpoint("verify", root)
    assert result.exit_code == 2
    error = next(line for line in result.output.splitlines() if line.startswith("error: "))
    for name in ("step-00000010/rank-00000", "step-00000010/rank-00001", "step-00000002/rank-00000"):
        assert f"{name}.safetensors: is damaged" in error
    assert f"the newest good one is {root / 'step-00000009'}" in error
    assert "step-00000009: every byte is what was written" in result.output


def test_a_missing_file_is_damage(root: Path) -> None:
    (root / "step-00000010/rank-00001.safetensors").unlink()
    result = checkpoint("verify", root / "step-00000010")
    assert result.exit_code == 2
    assert "rank-00001.safetensors: cannot be read" in result.output
    assert "good one" not in result.output  # the others were not looked at


def test_an_index_that_is_cut_off_is_listed_as_such(root: Path) -> None:
    path = root / "step-00000009" / INDEX_NAME
    path.write_bytes(path.read_bytes()[:-20])
    assert checkpoint("list", root).output.splitlines()[1].startswith(f"{path}: cannot be read")
    assert checkpoint("verify", root).exit_code == 2


def test_without_checksums_nothing_is_claimed(root: Path) -> None:
    path = root / "step-00000009" / INDEX_NAME
    index = json.loads(path.read_text())
    del index["files"], index["checksum"]
    path.write_text(json.dumps({**index, "format": 1}))
    result = checkpoint("verify", root / "step-00000009")
    assert result.exit_code == 2
    assert "has no checksums" in result.output
    assert "every byte" not in result.output


def test_a_folder_without_checkpoints_is_one_line(tmp_path: Path) -> None:
    result = checkpoint("verify", tmp_path)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "no complete checkpoint" in result.output
