"""The dtype of each tensor of an export. `tests/distributed/test_kept_dtypes.py` has whole runs."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from jllm.models.weights.kept import KeptDtypes
from jllm.models.weights.saving import stage_files
from tests.models.chain import load_chain
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    with torch.device("meta"):
        found: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config("deepseek_v3"), dtype=torch.bfloat16)
    return found


def dtypes(model: PreTrainedModel, dtype: torch.dtype | None, source: Path | None = None) -> dict[str, torch.dtype]:
    kept = KeptDtypes(model, dtype, source)
    kept.look_at(model.state_dict())
    return {name: kept.of(name, tensor) for name, tensor in model.state_dict().items()}


def test_the_family_has_a_say_where_there_are_no_files(model: PreTrainedModel) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = dtypes(model, dtype)
        assert {each for name, each in found.items() if name.endswith("correction_bias")} == {torch.float32}
        assert {each for name, each in found.items() if not name.endswith("correction_bias")} == {dtype}
    plain = dtypes(model, None)
    assert all(plain[name] == tensor.dtype for name, tensor in model.state_dict().items())


def test_published_files_have_the_last_word(model: PreTrainedModel, tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.ones(4), BIAS: torch.ones(4, dtype=torch.bfloat16), "n": torch.ones(1).int()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = dtypes(model, torch.bfloat16, tmp_path)
    assert found["model.norm.weight"] == torch.float32
    assert found[BIAS] == torch.bfloat16
    assert found["model.embed_tokens.weight"] == torch.bfloat16
    assert dtypes(model, torch.bfloat16, tmp_path / "nothing there") == dtypes(model, torch.bfloat16)


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "olmo_hybrid", "lfm2_moe"])
def test_layers_that_ask_for_fp32_themselves(tmp_path: Path, family: str) -> None:
    """Of a model in bf16, whatever stage they are on, and without the published files to look at."""
    make_folder(tiny_config(family), tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "plain")
    expected = {name: each.dtype for path in (tmp_path / "plain").glob("*.safetensors")
                for name, each in load_file(path).items()}  # fmt: skip
    assert torch.float32 in expected.values()
    found = {}
    for stage in load_chain(tmp_path / "model", [0, 2, 4], dtype=torch.bfloat16):
        for _, tensors in stage_files(stage.model, stage.span, dtype=torch.bfloat16):
            found |= {name: each.dtype for name, each in tensors.items()}
    assert found == expected
