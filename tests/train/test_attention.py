"""The attention of a run: its kernel, or that of shared rows with their plan, or a refusal."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jllm.errors import UserError
from jllm.models.sequence_parallel.attention import NAME
from jllm.models.weights.source import causal_class
from jllm.train.attention import attention_of, kernel_of
from jllm.train.config import TrainConfig
from tests.models.tiny import tiny_config


def found(family: str, **options: Any) -> Any:
    model = tiny_config(family)
    config = TrainConfig(model=Path("model"), train_data=("data",), precision="fp32", **options)
    return attention_of(config, model, causal_class(model))


def test_whole_rows_have_a_kernel() -> None:
    assert found("llama") == ("sdpa", None)
    assert found("llama", attn_implementation="eager") == ("eager", None)
    assert found("gpt_oss") == ("eager", None)


def test_shared_rows_have_a_plan() -> None:
    name, plan = found("llama", sequence_parallel_size=2, model_parallel_size=2)
    assert (name, plan.mode, plan.ranks, plan.by_lengths) == (NAME, "ulysses", 2, False)
    assert found("llama", sequence_parallel_size=2, sequence_parallel_mode="balanced")[1].mode == "balanced"
    with pytest.raises(UserError, match="--sequence_parallel_size 2: model type 'mamba' was not shown"):
        found("mamba", sequence_parallel_size=2)
    says = "--sequence_parallel_size 4 does not divide the 4 attention heads in 2 slices; give a divisor, or"
    with pytest.raises(UserError, match=says):
        found("llama", sequence_parallel_size=4, model_parallel_size=2, sequence_parallel_mode="ulysses")


def test_runs_have_the_kernel_of_whole_rows() -> None:
    """What references of pairs were made with is compared by this name."""
    for family, whole in (("llama", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")):
        model_class = causal_class(tiny_config(family))
        name, plan = found(family, sequence_parallel_size=2)
        assert kernel_of(name, plan, model_class) == whole
        assert kernel_of(whole, None, model_class) == whole
    by_lengths = dataclasses.replace(found("llama", sequence_parallel_size=2)[1], by_lengths=True)
    assert kernel_of(NAME, by_lengths, causal_class(tiny_config("llama"))) == "varlen"
