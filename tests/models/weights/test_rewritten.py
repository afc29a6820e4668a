"""A folder written anew: complete or not there, by one command at a time, with what lay beside the weights."""

import json
from pathlib import Path

import pytest
import torch

from jllm import atomic
from jllm.errors import UserError
from jllm.models.weights.rewritten import config_of, places_of, raw_config, set_everywhere, written_folder
from jllm.models.weights.source import bare_model, causal_class, read_config
from jllm.models.weights.streamed_file import passed_on, stored_tensors
from tests.fixtures import tiny_llama


def copied(source: Path, target: Path, **changes: object) -> None:
    files = [[passed_on(tensor) for tensor in tensors] for tensors in stored_tensors(source)]
    raw = {**raw_config(source), **changes} if changes else None
    with written_folder(source, target, files, raw, what="a copy"):
        pass


def test_a_copy(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    copied(model, tmp_path / "new")
    for path in model.rglob("*.*"):
        if path.suffix != ".safetensors":
            assert (tmp_path / "new" / path.relative_to(model)).read_bytes() == path.read_bytes()
    copied(model, tmp_path / "other", rope_theta=1.0)
    assert json.loads((tmp_path / "other/config.json").read_text())["rope_theta"] == 1.0


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    files = [[passed_on(tensor) for tensor in tensors] for tensors in stored_tensors(model)]
    with pytest.raises(RuntimeError), written_folder(model, tmp_path / "new", files, None, what="x"):
        raise RuntimeError
    with pytest.raises(UserError, match="no stage files"), written_folder(model, tmp_path / "new", [], None, what="x"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_command_at_a_time(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    with atomic.new_folder(tmp_path / "new") as folder:
        (folder / "x").write_text("")
        with pytest.raises(UserError, match="another command is writing it"):
            copied(model, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x"], "the first is not disturbed"


def test_what_a_killed_command_left_is_replaced(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    left = atomic.temporary_name(tmp_path / "new")
    left.mkdir()
    (left / "model-stage-00009-00000.safetensors").write_text("half")
    copied(model, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in model.iterdir())
    assert not left.exists()


def test_configurations(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    assert config_of(raw_config(model)).to_dict() | {"_name_or_path": ""} == read_config(model).to_dict() | {
        "_name_or_path": ""
    }
    nested = {"a": {"size": 1, "b": {"size": 2}}, "c": {"d": 3}}
    assert set_everywhere(nested, "size", 9) == {"a": {"size": 9, "b": {"size": 9}}, "c": {"d": 3}, "size": 9}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps({"model_type": "qwen"}))
    with pytest.raises(UserError, match="jllm convert"):
        raw_config(tmp_path / "old")


def test_places(tmp_path: Path) -> None:
    """With the prefix of the base model or without; and what is converted is told."""
    config = read_config(tiny_llama(tmp_path / "model", tied=False))
    model = bare_model(config, causal_class(config), dtype=torch.float32)
    names = ["model.norm.weight", "norm.weight", "lm_head.weight", "nothing"]
    assert places_of(model, names) == {
        "model.norm.weight": ("model.norm.weight", False),
        "norm.weight": ("model.norm.weight", False),
        "lm_head.weight": ("lm_head.weight", False),
        "nothing": ("nothing", False),
    }
