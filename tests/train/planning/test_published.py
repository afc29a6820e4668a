"""Published shapes have as many parameters as their publishers say, and folders are read as ever."""

from pathlib import Path

import pytest

from jllm.errors import UserError
from jllm.models.pipeline.costs import estimate_costs
from jllm.models.pipeline.structure import count_layers
from jllm.train.planning.published import PUBLISHED, model_config
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

BILLIONS = {
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.21,
    "llama-3-8b": 8.03,
    "llama-3-70b": 70.55,
    "qwen3-1.7b": 1.721,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "mistral-7b": 7.24,
    "mixtral-8x7b": 46.70,
    "mixtral-8x22b": 140.6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    config = model_config(name.upper())
    total = estimate_costs(config).parameters(0, count_layers(config)).total
    assert total / 1e9 == pytest.approx(BILLIONS[name], rel=2e-3)


def test_a_folder(tmp_path: Path) -> None:
    make_folder(tiny_config("qwen3"), tmp_path)
    assert model_config(str(tmp_path)).model_type == "qwen3"
    with pytest.raises(UserError, match=r"no such folder, and no published shape Did you mean \"llama-3-8b\"\?; give"):
        model_config("llama3-8b")
