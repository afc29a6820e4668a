"""What a manifest or an index names lies in its own folder, or is refused by name, with a reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jllm import atomic
from jllm.data.dataset.manifest import MANIFEST_NAME, read_manifest
from jllm.errors import UserError
from jllm.models.weight_index import files_in_index
from jllm.models.weights.source import weight_files
from jllm.train.checkpoint.folders import INDEX_NAME
from jllm.train.checkpoint.format import CHECKSUM, checksum_of_index
from jllm.train.checkpoint.reader import CheckpointReader, DamagedCheckpointError
from tests.fixtures import random_rows, write_rows
from tests.security.hostile import configured

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = ["../precious", "/etc/passwd", "a/../../precious", "..", "", ".", "a//b", "./a", "a/", "C:\\x", "a\0b"]


@pytest.mark.parametrize("name", [*OUTSIDE, None, 5, ["a"]])
def test_names_that_lead_elsewhere_have_a_reason(name: object) -> None:
    assert (atomic.plain_name(name) or "").strip()


@given(st.lists(st.text(st.characters(blacklist_characters="/\0\\:", blacklist_categories=("Cs",)), min_size=1)
                .filter(lambda part: part not in (".", "..")), min_size=1, max_size=4))  # fmt: skip
def test_plain_names_are_taken_and_stay_inside(parts: list[str]) -> None:
    name = "/".join(parts)
    assert atomic.plain_name(name) is None
    assert Path("/folder", name).is_relative_to("/folder")


@given(st.text(st.sampled_from("./a\\:C"), max_size=8))
def test_no_taken_name_leads_out(name: str) -> None:
    if atomic.plain_name(name) is None:
        lies = Path("/folder/of", name)
        assert lies.is_relative_to("/folder/of")
        assert ".." not in lies.parts


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = write_rows(tmp_path / "set", random_rows(3))
    path = folder / MANIFEST_NAME
    value = json.loads(path.read_text(encoding="utf-8"))
    value["files"][0]["path"] = name
    path.write_text(json.dumps(value), encoding="utf-8")
    with pytest.raises(UserError, match=r"not a jllm manifest \(.+\)"):
        read_manifest(folder)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", [*OUTSIDE, 5, None, ["a"]])
def test_a_weight_index_names_files_of_its_folder(tmp_path: Path, name: object, index: str) -> None:
    (tmp_path / "precious").write_text("precious", encoding="utf-8")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / index).write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is not a weight index \(.+\)"):
        weight_files(folder)
    with pytest.raises(UserError, match=r"is not a weight index \(.+\)"):
        files_in_index(folder / index)


@pytest.mark.parametrize("tool", ["ask", "evaluate"])
def test_tools_read_no_weights_outside(tmp_path: Path, tool: str) -> None:
    folder = configured(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes(b"precious")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    data = write_rows(tmp_path / "set", random_rows(3))
    more = {"ask": ["--prompt", "a"], "evaluate": ["--data", str(data)]}[tool]
    command = [sys.executable, str(ROOT / f"tools/{tool}.py"), "--model", str(folder), *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "'../outside.safetensors' leads out of the folder" in done.stderr


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["parts", "files"])
def test_a_checkpoint_names_files_of_its_folder(tmp_path: Path, name: str, where: str) -> None:
    index: dict[str, object] = {"format": 2, "tensors": {}, "files": {}}
    if where == "parts":
        index["tensors"] = {"x": {"parts": [{"file": name}]}}
    else:
        index["files"] = {name: {}}
    index[CHECKSUM] = checksum_of_index(index)
    (tmp_path / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DamagedCheckpointError, match="names a file that is none of the checkpoint's"):
        CheckpointReader(tmp_path)
