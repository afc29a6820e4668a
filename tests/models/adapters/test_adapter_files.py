"""What is no configuration of an adapter is refused by name, without peft."""

import json
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME, read_fields


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    assert read_fields(tmp_path)["r"] == 4


@pytest.mark.parametrize("text", ["", "[]", "{", '"LORA"', "{}", "[" * 100_000, "\xff"])
def test_what_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="--lora"):
        read_fields(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("r", value) for value in (0, -1, True, 4.0, "4", None)),
        *(("lora_alpha", value) for value in (0, True, "8", None, float("nan"), float("inf"), -float("inf"))),
        *(("rank_pattern", value) for value in (5, ["q_proj"], {"q_proj": 0}, {"q_proj": "4"}, {"q_(proj": 4})),
        *(("alpha_pattern", value) for value in (5, {"q_proj": "x"}, {"q_proj": float("nan")}, {"q_(proj": 4})),
        *(("target_modules", value) for value in (5, [5], "q_(proj", {"q_proj": 1})),
        *(("modules_to_save", value) for value in (5, [None], "lm_head")),
    ],
)
def test_a_setting_that_cannot_be_meant(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | {name: value}))
    with pytest.raises(UserError, match=f"--lora .*{name} .*allowed is .*; correct it"):
        read_fields(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": None, "alpha_pattern": {}, "target_modules": None, "modules_to_save": None},
        {"rank_pattern": {r"layers\.1\..*": 2}, "alpha_pattern": {"q_proj": 0.5}, "lora_alpha": -2.5},
        {"target_modules": r".*\.(q|v)_proj", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    ],
)
def test_settings_that_peft_writes(tmp_path: Path, settings: dict[str, Any]) -> None:
    fields = {"peft_type": "LORA", "r": 4} | settings
    (tmp_path / CONFIG_NAME).write_text(json.dumps(fields))
    assert read_fields(tmp_path) == fields


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=CONFIG_NAME):
        read_fields(tmp_path)
