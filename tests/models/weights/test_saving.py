"""Stages that are saved are one folder for plain transformers, with the published names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from tests.models.chain import (
    packed_batch,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_saved_stages_load_as_one_model(family_folder: Path, boundaries: list[int], tmp_path: Path) -> None:
    for span in spans_of(boundaries):
        model = load_stage(family_folder, span, dtype=torch.float32)
        save_stage(model, span, tmp_path, dtype=torch.float32, shard_bytes=60_000)
    write_companions(model, tmp_path, dtype=torch.float32, source=family_folder)
    weight_map = write_index(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(set(weight_map.values()))
    before = AutoModelForCausalLM.from_pretrained(family_folder)
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(after) is type(before)
    ids, _ = packed_batch(96)
    assert torch.equal(before(ids).logits, after(ids).logits)
    published = {key for file in family_folder.glob("*.safetensors") for key in _keys(file)}
    assert set(weight_map) == published


def _keys(file: Path) -> list[str]:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return [key for key in json.loads(file.read_bytes()[8 : 8 + size]) if key != "__metadata__"]


PLACES = {
    "none": {},
    "chat_template.jinja": {"chat_template.jinja": "own"},
    "chat_template.json": {"chat_template.json": '{"chat_template": "own"}'},
    "settings": {"tokenizer_config.json": '{"chat_template": "own"}'},
    "named": {"additional_chat_templates/tool_use.jinja": "tools"},
    "named and own": {"additional_chat_templates/tool_use.jinja": "tools", "chat_template.jinja": "own"},
    "settings without one": {"tokenizer_config.json": '{"chat_template": null}'},
    "broken settings": {"tokenizer_config.json": "{"},
}


@pytest.mark.parametrize("template", [None, "of the data"])
@pytest.mark.parametrize("place", PLACES)
def test_chat_templates_go_with_the_model(
    family_folder: Path, tmp_path: Path, place: str, template: str | None
) -> None:
    """The model's own, named ones too, from wherever it has them; that of the data where it has none."""
    source = Path(shutil.copytree(family_folder, tmp_path / "source"))
    for name, text in PLACES[place].items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    model = load_stage(source, spans_of([0, 4])[0], dtype=torch.float32)
    for _ in range(2):  # also into a folder that has them
        write_companions(model, tmp_path / "out", dtype=torch.float32, source=source, chat_template=template)
    expected = dict(PLACES[place])
    if template is not None and place in ("none", "settings without one", "broken settings"):
        expected["chat_template.jinja"] = template
    found = {
        path.relative_to(tmp_path / "out").as_posix(): path.read_text()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and ("template" in str(path.relative_to(tmp_path / "out")) or "tokenizer" in path.name)
    }
    assert found == expected
