"""Random weights: the same for any number of stages, and nothing left to chance."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import init_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_init_does_not_depend_on_stages(family: str, tmp_path: Path) -> None:
    name, _, tied = family.partition("-")
    config = tiny_config(name, tied=bool(tied))
    found = []
    for boundaries in ([0, 4], [0, 2, 4], [0, 1, 3, 4]):
        target = tmp_path / str(len(boundaries))
        for span in spans_of(boundaries):
            model = init_stage(config, span, dtype=torch.float32, seed=7)
            save_stage(model, span, target)
        write_companions(model, target, dtype=torch.float32)
        write_index(target)
        found.append(AutoModelForCausalLM.from_pretrained(target).state_dict())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[key], found[0][key]) for key in other)
    down = [value for key, value in found[0].items() if key.endswith("q_proj.weight")]
    assert all(abs(value.std().item() - 0.2) < 0.03 for value in down)
    assert not torch.equal(down[0], down[1])
    different = init_stage(config, spans_of([0, 4])[0], dtype=torch.float32, seed=8).state_dict()
    assert not torch.equal(different["model.layers.0.self_attn.q_proj.weight"], down[0])


@pytest.mark.parametrize("family", ["apertus", "openai-gpt", "data2vec-text", "gpt2", "gemma3_text", "deepseek_v4"])
def test_init_leaves_nothing_to_chance(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is NaN before: what the family's `_init_weights` does not reach comes from its constructor."""
    real = torch.nn.Module.to_empty

    def poisoned(module: torch.nn.Module, **keywords: object) -> torch.nn.Module:
        real(module, **keywords)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data.fill_(
                float("nan") if tensor.is_floating_point() else 77 if tensor.dtype != torch.bool else True
            )
        return module

    config = tiny_config(family)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    buffers = {**dict(plain.named_buffers()), **{n: p for n, p in plain.named_parameters() if n.endswith("alpha_p")}}
    monkeypatch.setattr(torch.nn.Module, "to_empty", poisoned)
    found: list[dict[str, torch.Tensor]] = []
    for boundaries in ([0, 4], [0, 1, 4]):
        found.append({})
        for span in spans_of(boundaries):
            model = init_stage(config, span, dtype=torch.float32, seed=7)
            found[-1] |= {n: t for n, t in (*model.named_parameters(), *model.named_buffers()) if t.numel()}
    for name, tensor in found[0].items():
        assert not tensor.isnan().any(), name
        assert name not in buffers or torch.equal(tensor, buffers[name]), name
        assert name not in found[1] or torch.equal(tensor, found[1][name]), name
    assert len(found[1].keys() & found[0].keys()) > len(found[0]) / 2
    if family == "openai-gpt":
        weight = found[0]["transformer.h.1.attn.c_attn.weight"]
        assert weight.std().item() == pytest.approx(
            dict(plain.named_parameters())["transformer.h.1.attn.c_attn.weight"].std().item(), rel=0.1
        )
        assert not torch.equal(weight, found[0]["transformer.h.2.attn.c_attn.weight"])
