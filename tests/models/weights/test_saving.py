"""Stages that are saved are one folder for plain transformers, with the published names."""

import json
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
