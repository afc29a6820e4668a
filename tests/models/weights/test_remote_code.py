"""Models whose code comes in their folder: run only when asked for, and then split like any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from jllm.errors import UserError
from jllm.models.pipeline.costs import estimate_costs
from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import init_stage, load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from jllm.models.weights.source import causal_class, model_info, read_config
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, whole_loss_and_gradients
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
# A Llama whose logits are halved, so that it is not mistaken for a plain one.
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(__file__).with_name("was-run").touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits / 2
        return output
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    # transformers copies such code to a folder of its own before it runs it.
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    # And registers their classes, for this process.
    for registered in (AutoModelForCausalLM._model_mapping, CONFIG_MAPPING):
        monkeypatch.setattr(registered, "_extra_content", dict(registered._extra_content))
    folder = tmp_path / "model"
    make_folder(tiny_config("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE)
    return folder


def test_nothing_is_run_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    for read in (read_config, model_info):
        with pytest.raises(UserError, match="--trust_remote_code"):
            read(folder)
    with pytest.raises(UserError, match="--trust_remote_code"):
        load_stage(folder, spans_of([0, 2, 4])[0], dtype=torch.float32)
    assert not list(tmp_path.rglob("was-run"))


def test_stages_equal_the_whole_model(folder: Path, tmp_path: Path) -> None:
    trust = {"trust_remote_code": True}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **trust).train()
    assert list(tmp_path.rglob("was-run"))
    ids, integers = packed_batch(96)
    loss, gradients = whole_loss_and_gradients(whole, ids, integers)
    stages = load_chain(folder, [0, 1, 4], **trust)
    found, chained = chained_loss_and_gradients(stages, ids, integers)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chained[name], gradient, atol=1e-5, rtol=1e-4)
    target = tmp_path / "saved"
    for stage in stages:
        save_stage(stage.model, stage.span, target, dtype=torch.float32)
    write_companions(stages[-1].model, target, dtype=torch.float32, source=folder)
    write_index(target)
    again = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, **trust)
    assert type(again).__name__ == "OwnForCausalLM"
    assert torch.equal(again(ids).logits, whole.eval()(ids).logits)
    shutil.copyfile(folder / "config.json", target / "config.json")
    assert AutoConfig.from_pretrained(target, **trust).model_type == "own"


def test_costs_and_random_weights(folder: Path) -> None:
    config = read_config(folder, trust_remote_code=True)
    family = causal_class(config, folder=folder, trust_remote_code=True)
    whole = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    costs = estimate_costs(config, family=family)
    assert costs.parameters(0, 4).total == sum(parameter.numel() for parameter in whole.parameters())
    model = init_stage(config, spans_of([0, 2, 4])[1], dtype=torch.float32, seed=1, family=family)
    assert type(model).__name__ == "OwnForCausalLM"
