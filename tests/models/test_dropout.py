"""Dropout is said with its fields; without it training is deterministic; exports say what was published."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, PretrainedConfig

from jllm.errors import UserError
from jllm.models.dropout import described, dropout_left, dropout_of, set_dropout
from jllm.models.pipeline.span import spans_of
from jllm.models.weights.loading import init_stage, load_stage
from jllm.models.weights.saving import write_companions
from tests.models.tiny import tiny_config

FAMILIES = ("gpt2", "gptj", "gpt_bigcode", "biogpt", "bloom", "falcon", "phi", "qwen2", "opt", "stablelm")


def with_dropout(model_type: str, rate: float = 0.3) -> PretrainedConfig:
    """A tiny configuration all of whose rates are above 0."""
    config = tiny_config(model_type)
    for name in dropout_of(config):
        owner = config
        *parts, field = name.split(".")
        for part in parts:
            owner = getattr(owner, part)
        setattr(owner, field, rate)
    return config


@pytest.mark.parametrize("model_type", FAMILIES)
def test_without_dropout_training_is_deterministic(model_type: str) -> None:
    """And with it it is not: so the rates that were found are those that count."""
    config = with_dropout(model_type)
    ids = torch.arange(12)[None]
    [span] = spans_of([0, config.get_text_config(decoder=True).num_hidden_layers])
    same = {}
    for rate in (None, 0.0):
        model = init_stage(config, span, dtype=torch.float32, seed=0, dropout=rate)
        assert model.training
        first, second = (model(input_ids=ids, use_cache=False).logits for _ in range(2))
        same[rate] = torch.equal(first, second)
        assert bool(dropout_left(model)) == (rate is None)
    assert same == {None: False, 0.0: True}


def test_fields_of_parts_and_of_other_heads() -> None:
    config = GPT2Config(resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.2, summary_first_dropout=0.5)
    assert dropout_of(config) == {"resid_pdrop": 0.1, "embd_pdrop": 0.0, "attn_pdrop": 0.2}
    assert described(config, None) == (
        "dropout: resid_pdrop 0.1, attn_pdrop 0.2, by the model's config.json; --dropout 0 trains without"
    )
    assert set_dropout(config, 0.4) == {"resid_pdrop": 0.1, "attn_pdrop": 0.2}
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0.4, 0.0, 0.4)
    whole = AutoConfig.for_model("llava", text_config={"model_type": "llama", "attention_dropout": 0.3})
    assert dropout_of(whole)["text_config.attention_dropout"] == 0.3
    assert set_dropout(whole, 0)["text_config.attention_dropout"] == 0.3
    assert whole.text_config.attention_dropout == 0


def test_there_is_nothing_to_replace() -> None:
    config = LlamaConfig()
    assert described(config, None) is None
    assert described(config, 0.0) is None
    assert set_dropout(config, 0.0) == {}
    with pytest.raises(UserError, match=r"--dropout 0.1: .* 'llama' has no dropout above 0 .* attention_dropout"):
        set_dropout(config, 0.1)


def test_an_export_says_what_was_published(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    config = with_dropout("gpt2", 0.25)
    GPT2LMHeadModel(copy.deepcopy(config)).save_pretrained(tmp_path / "source")
    [span] = spans_of([0, config.n_layer])
    model = load_stage(tmp_path / "source", span, dtype=torch.float32, dropout=0.0)
    assert model.config.resid_pdrop == 0
    assert dropout_left(model) == []
    write_companions(model, tmp_path / "out", dtype=torch.float32, source=tmp_path / "source")
    assert AutoConfig.from_pretrained(tmp_path / "out").resid_pdrop == 0.25
