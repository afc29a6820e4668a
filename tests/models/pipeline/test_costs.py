"""What a head costs where its logits are taken in chunks: twice its forward pass, and the memory of one chunk."""

import pytest
import torch
from transformers import LlamaForCausalLM

from jllm.models.pipeline.costs import Costs, estimate_costs
from jllm.models.pipeline.head import CHUNK_ELEMENTS, tokens_of_a_chunk
from tests.models.tiny import VOCAB, tiny_config

SHORT, LONG = tokens_of_a_chunk(VOCAB), 4 * tokens_of_a_chunk(VOCAB)


def costs_of(length: int) -> Costs:
    return estimate_costs(tiny_config("llama"), sequence_length=length, dtype=torch.bfloat16)


def test_head_in_chunks() -> None:
    short, long = costs_of(SHORT), costs_of(LONG)
    assert long.head_time / LONG == pytest.approx(short.head_time / SHORT * 4 / 3)
    assert short.head_activation_bytes == SHORT * VOCAB * (2 + 8)
    assert long.head_activation_bytes == short.head_activation_bytes <= CHUNK_ELEMENTS * (2 + 8)


def test_operations_count_nothing_twice() -> None:
    """What utilisation is measured against does not depend on what is recomputed."""
    short, long = costs_of(SHORT), costs_of(LONG)
    assert short.operations == pytest.approx(short.time(0, len(short.layers)))
    assert long.operations < long.time(0, len(long.layers))
    recomputed = estimate_costs(tiny_config("llama"), sequence_length=LONG, checkpoint_interval=1)
    assert recomputed.operations == long.operations


def test_head_that_is_not_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all logits are there, though not in fp32, and none are computed twice."""
    monkeypatch.setattr(LlamaForCausalLM, "__module__", "somewhere.else")
    short, long = costs_of(SHORT), costs_of(LONG)
    assert long.head_time / LONG == pytest.approx(short.head_time / SHORT)
    assert long.head_activation_bytes == LONG * VOCAB * 2 + SHORT * VOCAB * 8
