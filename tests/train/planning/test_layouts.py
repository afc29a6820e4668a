"""Plans beside what was measured on devices, beside counts by hand, and beside each other."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_rows import llama
from benchmarks.planned import MEASURED, QLORA, SETTINGS_OF, planned
from jllm.errors import UserError
from jllm.models.pipeline.costs import estimate_costs
from jllm.models.weights.quantisation import Quantisation, plan_quantisation
from jllm.models.weights.source import causal_class
from jllm.train.planning.cluster import Cluster
from jllm.train.planning.layouts import Layout, Wanted, estimate, layouts, left_out, plan
from tests.models.tiny import tiny_config

GIB = 2**30


def cluster(devices: int = 8, **more: Any) -> Cluster:
    known = {"devices_per_node": 8, "memory": 75.0 * GIB, "operations": 989e12, "inside": 400e9, "between": 50e9}
    return Cluster(devices=devices, **{**known, **more})


def of_a_layout(pipe: int = 1, **more: Any) -> Layout:
    known = {"data": 1, "sequence": 1, "tensor": 1, "rows": 1, "micro_batches": 8, "interval": 0}
    return Layout(pipe=pipe, **{**known, **more})


@pytest.mark.parametrize("name", MEASURED)
def test_as_measured(name: str) -> None:
    """Memory and speed within 15 %; what unpacking a model in few bits takes is not in the speed."""
    if SETTINGS_OF[name].lora:
        pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    found, setting = planned(name), SETTINGS_OF[name]
    gib, speed = MEASURED[name]
    assert found.memory / GIB == pytest.approx(gib, rel=0.15)
    assert found.tokens_per_second == pytest.approx(speed, rel=0.2 if name == QLORA else 0.15)
    assert found.bubble == pytest.approx((setting.stages - 1) / (setting.accumulation + setting.stages - 1))


@functools.cache
def tiny_plan(devices: int, length: int, rows: int, optimizer: str, layers: int) -> tuple[Wanted, list[Any], Any]:
    config = tiny_config("llama", num_hidden_layers=layers)
    wanted = Wanted(config=config, length=length, rows=rows, optimizer=optimizer)
    return wanted, *plan(wanted, cluster(devices))


@settings(max_examples=15, deadline=None)
@given(
    devices=st.sampled_from([1, 2, 6, 8, 16]),
    length=st.sampled_from([512, 4096]),
    rows=st.integers(1, 12),
    optimizer=st.sampled_from(["adamw", "adamw_kahan"]),
    layers=st.integers(1, 5),
)
def test_layouts_divide_all_there_is(devices: int, length: int, rows: int, optimizer: str, layers: int) -> None:
    """Devices, rows and layers; none is there twice; what fits is sorted; less memory leaves those that fit in it."""
    wanted, fitting, leanest = tiny_plan(devices, length, rows, optimizer, layers)
    found = [each.layout for each in fitting]
    assert len(set(found)) == len(found) == len([*layouts(wanted, cluster(devices))])
    for each in fitting:
        layout = each.layout
        assert layout.pipe * layout.data * layout.sequence * layout.tensor == devices
        assert layout.rows * layout.micro_batches * layout.data == rows
        assert len(each.boundaries) == layout.pipe + 1 <= layers + 1
        assert length // layout.sequence >= 1024 or layout.sequence == 1
        assert 0 <= each.exchange < 1
    assert [-each.tokens_per_second for each in fitting] == sorted(-each.tokens_per_second for each in fitting)
    if leanest is None:
        assert not found
        return
    assert leanest.memory == min(each.memory for each in fitting)
    limit = sorted(each.memory for each in fitting)[len(fitting) // 2]
    fewer, _ = plan(wanted, cluster(devices, memory=limit))
    assert fewer == [each for each in fitting if each.memory <= limit]
    none, still = plan(wanted, cluster(devices, memory=leanest.memory / 2))
    assert (none, still) == ([], leanest)


def test_shares_of_a_layer() -> None:
    """Half of each matrix, of its products and of the vocabulary; half of the tokens and all weights."""
    config = llama("wide")
    whole, cut, shared = (
        estimate_costs(config, sequence_length=4096, is_compiled=True, is_fused=True, **more)
        for more in ({}, {"slices": 2}, {"shares": 2})
    )
    vectors = 4096 * (2 * 8 + 1)
    assert whole.parameters(0, 8).total - vectors == 2 * (cut.parameters(0, 8).total - vectors)
    assert shared.parameters(0, 8) == whole.parameters(0, 8)
    assert whole.operations == cut.operations == shared.operations
    assert whole.time(0, 8) == pytest.approx(2 * cut.time(0, 8)) == pytest.approx(2 * shared.time(0, 8))
    # Per token of a compiled layer: its input and two norms' outputs and two products' outputs of the width, which all
    # slices have whole; queries and the heads' outputs, keys, values, gate, up and their product, which are cut.
    entire, halved = 4 * 4096, 2 * 4096 + 2 * 1024 + 3 * 14_336
    assert whole.layers[0].activation_bytes == 4096 * 2 * (entire + halved)
    assert cut.layers[0].activation_bytes == 4096 * 2 * (entire + halved / 2)
    assert shared.layers[0].activation_bytes == whole.layers[0].activation_bytes / 2


def test_exchanges_by_hand() -> None:
    """Sums over slices, hidden states between stages, gradients over pipelines."""
    config, rows, length = llama("wide"), 2, 4096
    hidden = rows * length * 4096 * 2
    slow = cluster(2, operations=1e30, inside=1e9)

    def seconds(*, of_rows: int, **layout: Any) -> float:
        wanted = Wanted(config=config, length=length, rows=of_rows, optimizer="adamw")
        return estimate(wanted, slow, of_a_layout(**{"rows": rows, "micro_batches": 4, **layout})).seconds

    sums = 4 * 8 + 2
    assert seconds(of_rows=8, tensor=2) == pytest.approx(4 * sums * hidden / 1e9)
    assert seconds(of_rows=8, pipe=2) == pytest.approx((4 + 2 - 1) * 2 * hidden / 1e9)
    parameters = estimate_costs(config).parameters(0, 8).total
    assert seconds(of_rows=16, data=2) == pytest.approx(parameters * (4 + 1) / 1e9)
    gathered, exchanged = 2 * 8 * 128, (2 * 32 + 2 * 8) * 128 / 2
    of_rows = 2 * 8 * 4 * (hidden / 2 / 4096) * min(gathered, exchanged)
    assert seconds(of_rows=8, sequence=2) == pytest.approx((of_rows + parameters * (4 + 1)) / 1e9)


def test_shared_layers_are_slower_than_their_share() -> None:
    """Links cost; layers are not compiled where slices share tokens, nor is attention over shared rows."""
    wanted = Wanted(config=llama("wide"), length=4096, rows=16, optimizer="adamw")
    sharded = dataclasses.replace(wanted, sharded_norms=True)
    one = estimate(wanted, cluster(1), of_a_layout(rows=2))
    cut = estimate(wanted, cluster(2), of_a_layout(rows=2, tensor=2))
    eager = estimate(sharded, cluster(2), of_a_layout(rows=2, tensor=2))
    shared = estimate(wanted, cluster(2), of_a_layout(rows=2, sequence=2))
    assert one.tokens_per_second < eager.tokens_per_second < 2 * one.tokens_per_second * 0.45 / 0.57
    assert eager.tokens_per_second < cut.tokens_per_second < 2 * one.tokens_per_second
    assert one.tokens_per_second < shared.tokens_per_second < 2 * one.tokens_per_second * 0.48 / 0.57
    assert dataclasses.replace(one.layout, tensor=2) == cut.layout


def test_stages_cut_inside_layers() -> None:
    """Where the slowest stage gains; each half of a layer has one of its sums, the first one its attention."""
    config = llama("wide")
    whole, halves = (
        Wanted(config=config, length=4096, rows=16, optimizer="adamw", split_dlayer=cut) for cut in (False, True)
    )
    gains = []
    for more in ({"pipe": 2}, {"pipe": 4}, {"pipe": 4, "tensor": 2}, {"pipe": 4, "sequence": 2}):
        layout = of_a_layout(**more)
        plain, cut = (estimate(wanted, cluster(8), layout) for wanted in (whole, halves))
        assert all(bound == int(bound) for bound in plain.boundaries)
        assert cut.seconds <= plain.seconds
        gains.append(any(bound % 1 for bound in cut.boundaries))
        assert gains[-1] == (cut.boundaries != plain.boundaries)
        assert cut.utilisation * cut.seconds == pytest.approx(plain.utilisation * plain.seconds)
    assert True in gains
    slow = cluster(4, operations=1e30, inside=1e9)
    wanted = Wanted(config=tiny_config("llama", num_hidden_layers=3), length=4096, rows=8, optimizer="adamw")
    shared = of_a_layout(2, tensor=2)
    even = estimate(dataclasses.replace(wanted, split_dlayer=True), slow, shared)
    assert even.boundaries == (0, 1.5, 3)
    hidden = 4096 * 32 * 2
    assert even.seconds == pytest.approx((8 + 1) * (4 * 1.5 + 1 + 2) * hidden / 1e9, rel=1e-3)
    refused = Wanted(config=tiny_config("cohere"), length=4096, rows=8, optimizer="adamw", split_dlayer=True)
    with pytest.raises(UserError, match="--split_dlayer: layers of model type 'cohere' cannot be cut inside"):
        plan(refused, cluster(2))


def test_tokens_shared_by_slices() -> None:
    """They keep less; never beside rows that are shared too. Their layers are not compiled."""
    config = llama("wide")
    whole, shared = (
        Wanted(config=config, length=4096, rows=16, optimizer="adamw", sharded_norms=share) for share in (False, True)
    )
    for interval in (0, 1):
        layout = of_a_layout(tensor=2, interval=interval)
        assert estimate(whole, cluster(2), layout).seconds < estimate(shared, cluster(2), layout).seconds
        plain, less = (
            estimate_costs(
                config, sequence_length=4096, checkpoint_interval=interval, is_fused=True, slices=2, sharded_norms=share
            ).memory(0, 8, in_flight=1)
            for share in (False, True)
        )
        # Of two norms what they keep in fp32 and in bf16, and what leads back to the hidden state.
        of_a_layer = 4096 * 4096 * (2 * 6 + 2 * 2) / 2
        kept_inputs = 8 * 4096 * 4096 * 2 / 2
        spared = of_a_layer + kept_inputs if interval else 8 * of_a_layer
        assert plain - less == pytest.approx(spared)
        assert estimate(shared, cluster(1), of_a_layout()) == estimate(whole, cluster(1), of_a_layout())
    found = [*layouts(shared, cluster(8))]
    assert any(each.tensor > 1 for each in found)
    assert any(each.sequence > 1 for each in found)
    assert not any(min(each.tensor, each.sequence) > 1 for each in found)


def test_adapters_beside_a_frozen_model() -> None:
    """No state and no gradients of the model, which may be in few bits; less than half of the backward pass's work."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    from jllm.models.adapters.lora_plan import LoraChoice, plan_lora

    config = llama("wide")
    family = causal_class(config)
    lora = plan_lora(config, family, LoraChoice(rank=16, alpha=16))
    quantised = plan_quantisation(config, family, Quantisation(bits=4), folder=Path("none"))
    full = Wanted(config=config, length=4096, rows=16, optimizer="adamw")
    adapted = dataclasses.replace(full, lora=lora)
    small = dataclasses.replace(adapted, quantised=quantised)
    layout = of_a_layout(rows=2)
    memory = [estimate(wanted, cluster(1), layout).memory for wanted in (full, adapted, small)]
    parameters = estimate_costs(config).parameters(0, 8).total
    trained = 8 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336))
    between = 8 * 2 * 4096 * 7 * 16 * 2  # of each micro-batch, what is between the maps of adapters
    head = 4096 * 128_256 * 2  # a chunk's share of the gradient, which the head has no more; and chunks are shorter
    assert memory[0] - memory[1] == pytest.approx(parameters * (18 - 2) - trained * 16 - between + head, rel=1e-2)
    in_bits = 8 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14_336)
    assert memory[1] - memory[2] == pytest.approx(in_bits * (2 - 0.5 - 1 / 64), rel=1e-2)
    copies = [estimate(wanted, cluster(2, operations=1e30), of_a_layout(data=2)) for wanted in (full, adapted)]
    # fp32 sums, and weights back from those who share the masters, which adapters have not.
    assert copies[0].seconds / copies[1].seconds == pytest.approx(parameters * (4 + 1) / (trained * 4), rel=1e-3)
    assert {each.tensor for each in layouts(small, cluster(8))} == {1, 2, 4, 8}
    assert left_out(small) == []
    narrow = llama("wide")
    narrow.intermediate_size = 192
    plans = (
        plan_lora(narrow, family, LoraChoice(rank=16, alpha=16)),
        plan_quantisation(narrow, family, Quantisation(bits=4), folder=Path("none")),
    )
    cut = dataclasses.replace(small, config=narrow, lora=plans[0], quantised=plans[1])
    assert {each.tensor for each in layouts(cut, cluster(8))} == {1}
    assert left_out(cut) == [
        "--model_parallel_size 2: model.layers.*.mlp.down_proj.weight in 4 bits would have rows of 96 weights in a"
        " slice, and 64 in a row share a scale; give another number, or --skip_quant for those"
    ]


@pytest.mark.parametrize(
    ("family", "stages"), [("mamba", 4), ("gemma3n_text", None), ("bart", None), ("falcon_h1", 1), ("gemma4_text", 4)]
)
def test_of_any_family(family: str, stages: int | None) -> None:
    """Only what the trainer takes: other families in one stage, or not at all, with the reason."""
    wanted = Wanted(config=tiny_config(family), length=4096, rows=4, optimizer="adamw")
    if stages is None:
        with pytest.raises(UserError, match=r"list of decoder layers|can be built from it"):
            plan(wanted, cluster(4))
        return
    found, _ = plan(wanted, cluster(4))
    assert max(each.layout.pipe for each in found) == stages
    said = left_out(wanted)
    assert any("cannot be split into 2 pipeline stages" in each for each in said) == (stages == 1)
