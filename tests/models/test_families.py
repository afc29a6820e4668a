"""Every named family: stages equal the whole model, tied and untied; what they save is what they loaded."""

from pathlib import Path

import pytest
import torch

from jllm.errors import UserError
from jllm.models.families import NAMED, check_split
from jllm.models.stage import StageSpan
from tests.models.family_check import compare_export, compare_stages, make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
# Families whose configurations have no tied variant in use: experts too large to care, or a class that forbids it.
UNTIED_ONLY = {"mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "glm4"}
CASES = [(family, tied) for family in NAMED for tied in (False, True) if not (tied and family in UNTIED_ONLY)]


@pytest.mark.parametrize(("family", "tied"), CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES])
def test_named_family(family: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(family, tied=tied)
    make_folder(config, tmp_path / "whole")
    for stages in (2, 3):
        for packed in (False, True):
            difference = compare_stages(config, tmp_path / "whole", stages=stages, packed=packed)
            assert difference.is_equal, difference
    export = compare_export(config, tmp_path / "whole", tmp_path / "saved", stages=3)
    assert export.is_equal, export


@pytest.mark.parametrize(
    ("family", "overrides", "says"),
    [
        ("gemma3n_text", {}, "own embedding"),
        ("gemma4_text", {"num_kv_shared_layers": 2}, "reuse keys"),
        ("hrm_text", {}, "over and over"),
    ],
)
def test_refusals_say_why(family: str, overrides: dict[str, object], says: str) -> None:
    config = (
        tiny_config(family, hidden_size_per_layer_input=8, **overrides)
        if "gemma3n" in family
        else tiny_config(family, **overrides)
    )
    with pytest.raises(UserError, match=says) as caught:
        check_split(config, StageSpan(index=1, count=2, first_layer=2, end_layer=4))
    assert "\n" not in str(caught.value)
    check_split(config, StageSpan(index=0, count=1, first_layer=0, end_layer=4))
