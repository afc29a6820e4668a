"""Chained stages equal the whole model: loss, every gradient, packed rows, tied or not; and so do saved stages."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import init_stage, load_stage
from jllm.models.weights.saving import save_stage, write_companions, write_index
from tests.models.chain import (
    chained_loss_and_gradients,
    kept_logits,
    load_chain,
    packed_batch,
    tied_names,
    whole_loss_and_gradients,
    worst_gradient,
)
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["llama-tied", "mixtral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, _, tied = request.param.partition("-")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(tiny_config(family, tied=bool(tied))).save_pretrained(path)
    return path


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_chain_equals_whole_in_eager_attention(folder: Path, boundaries: list[int]) -> None:
    """`test_families` compares with SDPA."""
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").train()
    stages = load_chain(folder, boundaries, attn_implementation="eager")
    for packed in (False, True):
        ids, integers = packed_batch(96, packed=packed)
        loss, gradients = whole_loss_and_gradients(whole, ids, integers)
        chained_loss, chained = chained_loss_and_gradients(stages, ids, integers)
        torch.testing.assert_close(chained_loss, loss, atol=1e-5, rtol=0)
        assert worst_gradient(gradients, chained)[0] < 1e-5, worst_gradient(gradients, chained)


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    stages = load_chain(folder, [0, 2, 4])
    logits: list[torch.Tensor] = []
    stages[-1].objective = kept_logits(logits)
    ids, integers = packed_batch(96)
    chained_loss_and_gradients(stages, ids, integers)
    alone = torch.stack([torch.full((1, 9), -100), torch.arange(9)[None]])
    chained_loss_and_gradients(stages, ids[:1, 5:14], alone)
    torch.testing.assert_close(logits[0][:1, 5:14], logits[1], atol=1e-5, rtol=1e-5)
    integers[1] = torch.arange(24)
    chained_loss_and_gradients(stages, ids, integers)
    assert (logits[2][:1, 5:14] - logits[1]).abs().max() > 1e-3


def test_tied_parameter_is_named_alike_at_both_ends(folder: Path) -> None:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    name = "model.embed_tokens.weight" if tied else None
    assert tied_names(load_chain(folder, [0, 1, 3, 4])) == [name, None, name]
    assert tied_names(load_chain(folder, [0, 4])) == [None]


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_saved_stages_load_as_one_model(folder: Path, boundaries: list[int], tmp_path: Path) -> None:
    for span in spans_of(boundaries):
        model = load_stage(folder, span, dtype=torch.float32)
        save_stage(model, span, tmp_path, dtype=torch.float32, shard_bytes=60_000)
    write_companions(model, tmp_path, dtype=torch.float32, source=folder)
    weight_map = write_index(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == sorted(set(weight_map.values()))
    before = AutoModelForCausalLM.from_pretrained(folder)
    after, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(after) is type(before)
    ids, _ = packed_batch(96)
    assert torch.equal(before(ids).logits, after(ids).logits)
    published = {key for file in folder.glob("*.safetensors") for key in _keys(file)}
    assert set(weight_map) == published


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


def _keys(file: Path) -> list[str]:
    size = int.from_bytes(file.read_bytes()[:8], "little")
    return [key for key in json.loads(file.read_bytes()[8 : 8 + size]) if key != "__metadata__"]
