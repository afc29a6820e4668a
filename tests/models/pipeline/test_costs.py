"""What stages cost: parameters and state that train, and a head whose logits are taken in chunks."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from jllm.models.pipeline.carving import stage_class
from jllm.models.pipeline.costs import (
    Costs,
    Parameters,
    StateBytes,
    estimate_costs,
    state_bytes,
)
from jllm.models.pipeline.head import CHUNK_ELEMENTS, tokens_of_a_chunk
from jllm.models.pipeline.partition import (
    stage_table,
)
from jllm.models.pipeline.span import spans_of
from jllm.models.trainable import ParameterChoice, select_trainable
from jllm.models.weights.quantisation import Quantisation, plan_quantisation
from jllm.models.weights.source import causal_class
from tests.models.pipeline.by_hand import all_of, config_of
from tests.models.tiny import VOCAB, tiny_config

SHORT, LONG = tokens_of_a_chunk(VOCAB), 4 * tokens_of_a_chunk(VOCAB)


def llama_costs(length: int) -> Costs:
    return estimate_costs(tiny_config("llama"), sequence_length=length, dtype=torch.bfloat16)


def test_head_in_chunks() -> None:
    short, long = llama_costs(SHORT), llama_costs(LONG)
    assert long.head_time / LONG == pytest.approx(short.head_time / SHORT * 4 / 3)
    assert short.head_activation_bytes == SHORT * VOCAB * (2 + 8)
    assert long.head_activation_bytes == short.head_activation_bytes <= CHUNK_ELEMENTS * (2 + 8)


def test_operations_count_nothing_twice() -> None:
    """What utilisation is measured against does not depend on what is recomputed."""
    short, long = llama_costs(SHORT), llama_costs(LONG)
    assert short.operations == pytest.approx(short.time(0, len(short.layers)))
    assert long.operations < long.time(0, len(long.layers))
    recomputed = estimate_costs(tiny_config("llama"), sequence_length=LONG, checkpoint_interval=1)
    assert recomputed.operations == long.operations


def test_head_that_is_not_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then all logits are there, though not in fp32, and none are computed twice."""
    monkeypatch.setattr(LlamaForCausalLM, "__module__", "somewhere.else")
    short, long = llama_costs(SHORT), llama_costs(LONG)
    assert long.head_time / LONG == pytest.approx(short.head_time / SHORT)
    assert long.head_activation_bytes == LONG * VOCAB * 2 + SHORT * VOCAB * 8


EMBEDDINGS = {"gpt2": "wte", "camembert": "word_embeddings"}


def test_memory_counts_what_trains_and_who_shares_the_state() -> None:
    """Bytes a parameter: weight, the sum of its gradients, and a rank's share of master weight and moments."""
    assert state_bytes(torch.bfloat16, sharded_over=1) == StateBytes(trained=2 + 4 + 4 + 8, frozen=2)
    assert state_bytes(torch.bfloat16, sharded_over=4) == StateBytes(trained=2 + 4 + 12 / 4, frozen=2)
    assert state_bytes(torch.bfloat16, sharded_over=4, on_host=True) == StateBytes(trained=2 + 4, frozen=2)
    assert state_bytes(torch.bfloat16, moments=0, sharded_over=4) == StateBytes(trained=2 + 4 + 4 / 4, frozen=2)
    assert state_bytes(torch.float32) == StateBytes(trained=4 + 4 + 8, frozen=4)
    config = config_of(4)
    state = StateBytes(trained=100.0, frozen=1.0)
    whole = estimate_costs(config, state=state, sequence_length=1)
    some = estimate_costs(
        config, state=state, sequence_length=1, selection=ParameterChoice(frozen_modules="mlp,embed_tokens")
    )
    mlp = 3 * 16 * 32
    assert whole.parameters(0, 2) == all_of(some.parameters(0, 2).total)
    assert some.parameters(0, 2).trained == whole.parameters(0, 2).total - 2 * mlp - 64 * 16
    # Frozen maps do not keep what they are given.
    inputs = 2 * 2 * (16 + 16 + 32)
    spared = whole.memory(0, 2, in_flight=1) - some.memory(0, 2, in_flight=1)
    assert spared == 99 * (2 * mlp + 64 * 16) + inputs
    assert "train" in stage_table(some, [0, 2, 4]).splitlines()[1]
    kept = estimate_costs(config, checkpoint_interval=1)
    offloaded = estimate_costs(config, checkpoint_interval=1, checkpoint_offload=True)
    saved = kept.memory(0, 2, in_flight=3) - offloaded.memory(0, 2, in_flight=3)
    assert saved == 3 * 2 * 2048 * 16 * 2  # in flight, layers, tokens, hidden size, bf16


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    ("family", "boundaries"),
    # A head that is registered before the embedding; the others have two stages as well.
    [("camembert", [0, 4])]
    + [(family, at) for family in ("gpt2", "gemma3_text", "gemma4_text", "llama") for at in ([0, 4], [0, 2, 4])],
)
def test_parameters_are_those_of_the_stages(family: str, boundaries: list[int], is_frozen: bool) -> None:
    """Learned positions beside a tied embedding, layers with configurations of their own."""
    config = tiny_config(family)
    selection = ParameterChoice(frozen_modules=EMBEDDINGS.get(family, "embed_tokens") if is_frozen else None)
    costs = estimate_costs(config, sequence_length=16, selection=selection)
    for span in spans_of(boundaries):
        with torch.device("meta"):
            model = stage_class(causal_class(config), span)._from_config(copy.deepcopy(config))
        selected = select_trainable(model, span, selection)
        found = costs.parameters(span.first_layer, span.end_layer)
        assert found == Parameters(total=selected.total, trained=selected.trainable)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_memory_of_what_is_held_in_few_bits(family: str) -> None:
    """All parameters are counted as parameters, whatever their bytes; experts are unpacked for the backward pass."""
    config, how = tiny_config(family), Quantisation(bits=4)
    plan = plan_quantisation(config, causal_class(config), how, folder=Path("none"))
    with torch.device("meta"):
        model = causal_class(config)(copy.deepcopy(config))
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in plan.parameters}
    assert wanted.keys() == plan.parameters
    held = sum(parameter.numel() for parameter in wanted.values())
    state = StateBytes(trained=100.0, frozen=2.0, quantised=how.bytes_of_a_parameter)
    # As adapters leave it: of the model itself nothing trains.
    given = {"state": state, "sequence_length": 4, "selection": ParameterChoice(attached_only=True)}
    plain, quantised = estimate_costs(config, **given), estimate_costs(config, quantised=plan.parameters, **given)
    assert quantised.parameters(0, 4).total == plain.parameters(0, 4).total
    assert quantised.parameters(0, 4).quantised == held
    assert quantised.parameters(0, 2) + quantised.parameters(2, 4) == quantised.parameters(0, 4) + Parameters(
        total=quantised.tied_parameters.total, trained=0
    )
    unpacked = 2 * sum(parameter.numel() for parameter in wanted.values() if parameter.ndim == 3)
    spared = plain.memory(0, 4, in_flight=1) - quantised.memory(0, 4, in_flight=1)
    assert spared == pytest.approx((2.0 - how.bytes_of_a_parameter) * held - unpacked)


def test_slices_of_what_is_cut_alone() -> None:
    """A family of which only the vocabulary is cut has whole layers on each process, and does their work on each."""
    llama, gpt2 = (
        [estimate_costs(tiny_config(name), dtype=torch.bfloat16, slices=slices) for slices in (1, 2)]
        for name in ("llama", "gpt2")
    )
    assert llama[1].share_of_whole(2) < 0.02
    assert gpt2[1].share_of_whole(2) > 0.8
    assert gpt2[1].layers[0].parameters == gpt2[0].layers[0].parameters
    assert gpt2[1].layers[0].time == gpt2[0].layers[0].time
    assert llama[1].layers[0].time == pytest.approx(llama[0].layers[0].time / 2)
    for one, two in (llama, gpt2):
        assert two.head_time == pytest.approx(one.head_time / 2, rel=0.01)
        assert two.operations == pytest.approx(one.operations)
        assert two.model_parameters == one.model_parameters
