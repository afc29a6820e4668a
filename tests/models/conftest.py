"""A model folder that several tests of stages need, once tied and once a mixture of experts."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.tiny import tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "mixtral"])
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, _, tied = request.param.partition("-")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(tiny_config(family, tied=bool(tied))).save_pretrained(path)
    return path
