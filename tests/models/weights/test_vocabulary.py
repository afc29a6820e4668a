"""Rows for new ids: the mean of those in use, in the tensor's type; nothing else changes, and ties stay."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTJConfig, GPTJForCausalLM

from jllm.errors import UserError
from jllm.models.weights import streamed_file
from jllm.models.weights.source import weight_files
from jllm.models.weights.streamed_file import TensorInMemory
from jllm.models.weights.vocabulary import _grown, resize_vocabulary
from tests.fixtures import VOCABULARY, tiny_llama


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_grows(tmp_path: Path, tied: bool, dtype: str) -> None:
    model = tiny_llama(tmp_path / "model", tied=tied, dtype=dtype)
    done = resize_vocabulary(model, tmp_path / "new", used=90, wanted=101, multiple=8)
    assert (done.before, done.after, done.padding) == (VOCABULARY, 104, 7)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "new/model.safetensors")
    assert before.keys() == after.keys()
    resized = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert set(done.tensors) == resized
    for name, tensor in before.items():
        if name not in resized:
            assert torch.equal(after[name], tensor), name
            continue
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name][:90], tensor[:90])
        assert torch.equal(after[name][90:], after[name][90:91].expand(14, -1))
        mean = tensor[:90].float().mean(0)
        torch.testing.assert_close(after[name][100].float(), mean.to(tensor.dtype).float(), atol=1e-6, rtol=1e-2)
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (104, tied)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded(torch.tensor([[100, 3]])).logits.shape[-1] == 104


def test_padding_rows_are_taken_first(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    done = resize_vocabulary(model, tmp_path / "new", used=90, wanted=93)
    assert (done.before, done.after, done.padding) == (VOCABULARY, VOCABULARY, 3)
    assert (tmp_path / "new/config.json").read_bytes() == (model / "config.json").read_bytes()
    embedding = load_file(tmp_path / "new/model.safetensors")["model.embed_tokens.weight"]
    before = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding[:90], before[:90])
    torch.testing.assert_close(embedding[90], before[:90].mean(0))


def test_a_head_with_a_bias_and_files_in_parts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model = GPTJForCausalLM(config)
    model.lm_head.bias.data.normal_()
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    done = resize_vocabulary(tmp_path / "model", tmp_path / "new", used=50, wanted=53)
    assert len(done.tensors) == 3
    assert len(weight_files(tmp_path / "new")) == len(weight_files(tmp_path / "model")) > 1
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    torch.testing.assert_close(after.lm_head.bias[50:], model.lm_head.bias.mean().expand(3))
    assert torch.equal(after.lm_head.weight[:50], model.lm_head.weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 30), st.integers(1, 5))
def test_rows_in_any_blocks(used: int, padding: int, more: int, width: int) -> None:
    held = torch.randn(used + padding, width, generator=torch.Generator().manual_seed(used))
    with patch.object(streamed_file, "BLOCK_BYTES", 40):
        tensor = _grown(TensorInMemory(name="x", tensor=held), used, used + padding + more)
        found = torch.frombuffer(bytearray(b"".join(map(bytes, tensor.blocks()))), dtype=torch.float32)
    found = found.reshape(used + padding + more, width)
    assert torch.equal(found[:used], held[:used])
    torch.testing.assert_close(found[used:], held[:used].mean(0).expand(padding + more, width))


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", tied=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="quantised weights"):
        resize_vocabulary(model, tmp_path / "new", used=90, wanted=101)
    assert not (tmp_path / "new").exists()
