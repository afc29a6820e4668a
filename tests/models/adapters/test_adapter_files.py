"""What is no configuration of an adapter is refused by name, without peft."""

import json
from pathlib import Path

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


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=CONFIG_NAME):
        read_fields(tmp_path)
