"""Model folders: facts without loading, only a stage's own tensors read, every mistake one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights import loading
from jllm.models.weights.source import model_info, read_config

WHOLE = StageSpan(index=0, count=1, first_layer=0, end_layer=4)


def test_info(folder: Path) -> None:
    info = model_info(folder)
    assert (info.vocab_size, info.num_layers) == (96, 4)
    assert info.dtype == torch.bfloat16
    assert info.model_type == "llama"
    assert not info.tied


def test_mistakes_are_one_line(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    def refuse(path: Path, says: str, span: StageSpan = WHOLE) -> None:
        with pytest.raises(UserError, match=says) as caught:
            loading.load_stage(path, span, dtype=torch.float32)
        assert "\n" not in str(caught.value)

    refuse(tmp_path / "nowhere", "does not exist")
    bare = copy("bare")
    (bare / "model.safetensors").unlink()
    refuse(bare, "no weights")
    (bare / "config.json").unlink()
    refuse(bare, "no config.json")
    broken = copy("broken")
    (broken / "config.json").write_text("{")
    refuse(broken, "not valid JSON")
    strange = copy("strange")
    (strange / "config.json").write_text('{"model_type": "lama"}')
    refuse(strange, 'Did you mean "llama"')
    (strange / "config.json").write_text('{"model_type": "vit"}')
    refuse(strange, "no causal language model")
    larger = copy("larger")
    config = json.loads((folder / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    refuse(larger, "missing", StageSpan(index=1, count=2, first_layer=3, end_layer=5))
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    refuse(larger, "do not fit its config.json")
    cut = copy("cut")
    (cut / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:2000])
    refuse(cut, "cannot be read|not a safetensors")
    refuse(folder, "at least one layer", StageSpan(index=1, count=2, first_layer=4, end_layer=4))
    index = copy("index")
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refuse(index, "missing")
    (strange / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    with pytest.raises(UserError, match="trust_remote_code"):
        read_config(strange)
