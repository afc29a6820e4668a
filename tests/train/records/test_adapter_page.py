"""`jllm adapter info`: a line a module, JSON, and a page with the same figures."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from jllm.commands.adapter import info


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter on two kinds of modules of three layers and on the head, made without peft."""
    torch.manual_seed(0)
    tensors = {}
    modules = [f"model.layers.{layer}.self_attn.{leaf}" for layer in range(3) for leaf in ("q_proj", "v_proj<i>")]
    for module in (*modules, "lm_head"):
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, 6)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(5, 2)
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    return folder


def run(*arguments: object) -> str:
    done = CliRunner().invoke(info, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_table(adapter: Path) -> None:
    lines = run(adapter).splitlines()
    assert lines[0].split()[:3] == ["module", "rank", "‖ΔW‖F"]
    assert [line.split()[0] for line in lines[1:8]][-1] == "lm_head"
    assert len({len(line) for line in lines[:8]}) == 1
    assert lines[8].startswith("LORA: 7 modules, rank 2, scaling 2, 154 parameters")
    assert lines[9].startswith("share of ‖ΔW‖²: q_proj ")


def test_json(adapter: Path) -> None:
    facts = json.loads(run(adapter, "--json"))
    assert sum(each["share"] for each in facts["modules"]) == pytest.approx(1)
    assert len(facts["modules"]) == 7
    assert len(facts["modules"][0]["singular_values"]) == 2


def test_the_page(adapter: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(adapter, "-o", page).splitlines()[-1] == f"wrote {page}"
    text = page.read_text(encoding="utf-8")
    assert text.count("<svg") == 6
    assert "<i>" not in text.replace("<i style", "").replace("<i class", ""), "names are escaped"
    assert "v_proj&lt;i&gt;" in text
    assert "lm_head" in text
    drawing = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert len(drawing.findall("polyline")) == 2


def test_mistakes(adapter: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([tmp_path / "nowhere"], "does not exist"),
        ([tmp_path], "has no adapter_config.json"),
        ([adapter, "-o", "page.pdf"], 'must end in ".html"'),
    ):
        done = CliRunner().invoke(info, [str(each) for each in arguments])
        assert done.exit_code == 2
        assert message in done.output
