"""Compiled decoder layers: equal losses and gradients, one graph for equal layers, no graph for every length."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch import config as graphs_config

from jllm.models.activation_checkpointing import checkpoint_activations
from jllm.models.adapters.control import attach_control
from jllm.models.adapters.lora import attach_lora
from jllm.models.adapters.lora_plan import LoraChoice, plan_lora
from jllm.models.attention import VARLEN
from jllm.models.compiled import CompiledLayers, Shape, compile_layers
from jllm.models.kernels import available as kernels
from jllm.models.pipeline.bundle import CONTROL_CLASS, READ
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.router_balance import RouterBalance
from jllm.models.weights.quantisation import Quantisation, plan_quantisation
from jllm.models.weights.source import causal_class, read_config
from tests.models import varlen_on_cpu
from tests.models.chain import (
    chained_loss_and_gradients,
    load_chain,
    packed_batch,
    token_objective,
    worst_gradient,
)
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)
SIZE = float(os.environ.get("JLLM_TEST_SIZE", "1"))
USUAL = Shape(2, 24)
QUICK = "aot_eager"
"""Traces forward and backward passes, and writes no code for them."""
PARTITIONED = "aot_eager_decomp_partition"
"""And decides what is kept for the backward pass, as a run does."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compiled(stages: list[PipelineStage], **options: Any) -> list[CompiledLayers]:
    """Compile what the stages have; no kind may fail."""
    given: dict[str, Any] = {"usual": USUAL, "backend": QUICK, "warn": pytest.fail, "tell": str} | options
    return [compile_layers(stage.model, stage.span, **given) for stage in stages]


def batch(rows: int = 2, length: int = 24, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    return packed_batch(96, batch=rows, length=length, packed=packed)


def assert_equal(
    stages: list[PipelineStage], expected: tuple[Tensor, dict[str, Tensor]], inputs: tuple[Tensor, Tensor]
) -> None:
    torch.manual_seed(0)
    loss, gradients = chained_loss_and_gradients(stages, *inputs)
    torch.testing.assert_close(loss, expected[0], atol=1e-5, rtol=0)
    assert worst_gradient(expected[1], gradients)[0] < 1e-5


SHAPES = [(2, 24, False), (2, 24, True), (2, 20, False), (2, 31, True), (3, 40, False), (5, 29, True), (2, 24, True)]


def test_lengths_and_documents(tmp_path: Path) -> None:
    """Equal layers are one graph, whatever their number; any further shape shares another one."""
    make_folder(tiny_config("llama", num_hidden_layers=6), tmp_path)
    stages = load_chain(tmp_path, [0, 2, 6])
    inputs = [batch(rows, length, packed=packed) for rows, length, packed in SHAPES]
    expected = [chained_loss_and_gradients(stages, *each) for each in inputs]
    found = compiled(stages)
    seen = []
    for each, values in zip(inputs, expected, strict=True):
        assert_equal(stages, values, each)
        seen.append(graphs())
    # Of two stages each: usual rows without a mask and with one, others without and with one.
    # The norm after the last layer has two more.
    assert seen == [3, 5, 8, 10, 10, 10, 10]
    assert [len(state.kinds) for state in found] == [1, 2]


@pytest.mark.parametrize("takes", [varlen_on_cpu.ENABLE_GQA, varlen_on_cpu.WITHOUT])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_documents_by_their_lengths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, takes: frozenset[str]
) -> None:
    """Whatever number of documents, and whatever the longest one has, they are one graph of each function."""
    monkeypatch.setattr(kernels, "BY_LENGTHS_ON", ("cpu",))
    monkeypatch.setattr(kernels, "varlen_attn", varlen_on_cpu.varlen_attn)
    monkeypatch.setattr(kernels, "_VARLEN_TAKES", takes)
    make_folder(tiny_config(family, sliding_window=6), tmp_path)
    masked, [stage] = load_chain(tmp_path, [0, 4]), load_chain(tmp_path, [0, 4], attn_implementation=VARLEN)
    inputs = []
    for rows, length, cuts in [(2, 24, (5, 9)), (2, 24, (7,)), (2, 24, (1, 3, 12)), (3, 20, (4,)), (4, 40, (9, 30))]:
        ids, integers = batch(rows, length)
        for cut in cuts:
            integers[1][:, cut:] = torch.arange(length - cut)
        inputs.append((ids, integers))
    expected = [chained_loss_and_gradients(masked, *each) for each in inputs]
    compiled([stage])
    seen = []
    for each, values in zip(inputs, expected, strict=True):
        assert_equal([stage], values, each)
        seen.append(graphs())
    assert seen == [2, 2, 2, 4, 4]


def test_evaluation(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = load_chain(tmp_path, [0, 4])
    inputs = batch()
    compiled([stage])
    stage(inputs).backward()
    before = graphs()
    for _ in range(2):
        stage.eval()
        with torch.no_grad():
            loss = stage(inputs)
        stage.train()
        torch.testing.assert_close(loss, stage(inputs), atol=1e-6, rtol=0)
        assert graphs() == before + 2  # a layer and the last norm


WAYS: dict[str, dict[str, Any]] = {
    "each layer": {"interval": 1},
    "uneven groups": {"interval": 3},
    "attention": {"attention_only": True},
    "attention offloaded": {"attention_only": True, "offload": True},
    "offloaded": {"interval": 2, "offload": True},
}


@pytest.mark.parametrize("way", WAYS if SIZE > 1 else ["uneven groups", "attention offloaded"])
def test_recomputed(way: str, tmp_path: Path) -> None:
    """Two micro-batches of different shape are in flight, as in a pipeline: each runs again as it ran."""
    make_folder(tiny_config("llama", num_hidden_layers=4), tmp_path)
    stages = load_chain(tmp_path, [0, 4])
    inputs = [batch(packed=True), batch(3, 17, packed=True)]
    expected = [chained_loss_and_gradients(stages, *each) for each in inputs]
    compiled(stages, attention_apart=WAYS[way].get("attention_only", False))
    states = [checkpoint_activations(stage.model, stage.span, is_compiled=True, **WAYS[way]) for stage in stages]
    for each, values in zip(inputs, expected, strict=True):
        assert_equal(stages, values, each)
    assert [state.recomputed for state in states] == [2 * state.units for state in states]
    first, second = (stages[0](each) for each in inputs)
    first.backward()
    second.backward()


@pytest.mark.parametrize("family", ["mixtral", "gemma3_text", *["deepseek_v3"] * (SIZE > 1)])
def test_other_layers(family: str, tmp_path: Path) -> None:
    make_folder(tiny_config(family), tmp_path)
    stages = load_chain(tmp_path, [0, 2, 4])
    inputs = batch()
    torch.manual_seed(0)
    expected = chained_loss_and_gradients(stages, *inputs)
    compiled(stages)
    assert_equal(stages, expected, inputs)


def test_watched_routers(tmp_path: Path) -> None:
    """Layers share a graph, and each router its own record."""
    make_folder(tiny_config("mixtral"), tmp_path)
    inputs = batch()
    reports = []
    for is_compiled in (False, True):
        stages = load_chain(tmp_path, [0, 4])
        if is_compiled:
            compiled(stages)
        balance = RouterBalance(stages[0].model, 0.1)
        torch.manual_seed(0)
        found = chained_loss_and_gradients(stages, *inputs)
        reports.append((found, balance.take()))
    (eager, plain), (shared, watched) = reports
    assert watched.load == plain.load
    assert abs(watched.loss - plain.loss) < 1e-6
    assert worst_gradient(eager[1], shared[1])[0] < 1e-5


LORA: list[tuple[bool, dict[str, Any] | None]] = [(False, None), (False, {"attention_only": True}), (True, None)]


@pytest.mark.parametrize(("use_dora", "ways"), LORA if SIZE > 1 else LORA[:1])
def test_lora(tmp_path: Path, use_dora: bool, ways: dict[str, Any] | None) -> None:
    """The first layer's input needs no gradient, which is another graph. peft's DoRA is traced in pieces."""
    pytest.importorskip("peft", reason="peft is not installed: pip install .[adapters]")
    make_folder(tiny_config("llama"), tmp_path)
    config = read_config(tmp_path)
    plan = plan_lora(config, causal_class(config), LoraChoice(rank=4, alpha=8.0, use_dora=use_dora))
    stages = load_chain(tmp_path, [0, 2, 4])
    for stage in stages:
        attach_lora(stage.model, plan, seed=1, dtype=torch.float32)
        for name, parameter in stage.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    inputs = batch()
    expected = chained_loss_and_gradients(stages, *inputs)
    compiled(stages, attention_apart=ways is not None and "attention_only" in ways)
    for stage in stages if ways is not None else ():
        checkpoint_activations(stage.model, stage.span, is_compiled=True, **ways)
    assert_equal(stages, expected, inputs)
    assert use_dora or ways is not None or graphs() == 4


def test_a_budget_of_memory(tmp_path: Path) -> None:
    """Less is kept for the backward pass, down to a layer's inputs; losses and gradients are the same."""
    make_folder(tiny_config("llama"), tmp_path)
    inputs = batch()
    kept = []
    with graphs_config.patch(activation_memory_budget=1.0):
        for budget in (1.0, 0.6, 0.0):
            torch._dynamo.reset()
            [stage] = load_chain(tmp_path, [0, 4])
            expected = chained_loss_and_gradients([stage], *inputs)
            compiled([stage], backend=PARTITIONED, memory_budget=budget)
            assert_equal([stage], expected, inputs)
            kept.append(kept_bytes(stage, inputs))
    hidden = inputs[0].numel() * 32 * 4
    assert kept[0] > 1.3 * kept[1] > 1.3 * kept[2]
    assert kept[2] < 4 * 3 * hidden


def kept_bytes(stage: PipelineStage, inputs: tuple[Tensor, Tensor]) -> int:
    """What compiled layers keep for the backward pass, parameters apart."""
    parameters = {each.data_ptr() for each in stage.parameters()}
    nodes = [stage(inputs).grad_fn]
    seen, kept = set(), dict[int, int]()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [each for each, _ in node.next_functions]
        if "CompiledFunction" in node.name():
            kept |= {each.data_ptr(): each.nbytes for each in node.saved_tensors}
    return sum(size for place, size in kept.items() if place not in parameters)


@pytest.mark.parametrize("bits", [4, 8] if SIZE > 1 else [4])
def test_quantised(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install .[adapters]")
    make_folder(tiny_config("llama", hidden_size=64, head_dim=16), tmp_path)
    config = read_config(tmp_path)
    family = causal_class(config)
    held = plan_quantisation(config, family, Quantisation(bits=bits), folder=tmp_path)
    [stage] = load_chain(tmp_path, [0, 4], quantisation=held)
    attach_lora(stage.model, plan_lora(config, family, LoraChoice(rank=4, alpha=8.0)), seed=1, dtype=torch.float32)
    inputs = batch()
    chained_loss_and_gradients([stage], *inputs)  # the first pass sets what kernels compute in
    expected = chained_loss_and_gradients([stage], *inputs)
    compiled([stage])
    assert_equal([stage], expected, inputs)
    assert graphs() == 3


def test_control_adapters(tmp_path: Path) -> None:
    make_folder(tiny_config("llama"), tmp_path)
    [stage] = load_chain(tmp_path, [0, 4])
    options = {"rank": 4, "prefix": structure_of(stage.model).layers, "layers": range(4), "width": 32, "seed": 1}
    classes = attach_control(stage.model, dtype=torch.float32, **options)
    for name, parameter in stage.model.named_parameters():
        if name.endswith("control_S"):
            torch.nn.init.normal_(parameter, std=0.5)
    read = (*READ, CONTROL_CLASS)
    adapted = PipelineStage(
        stage.model, stage.span, token_objective, read=read, is_frozen=True, tell=classes.tell
    ).train()
    ids, integers = batch()
    inputs = ids, torch.cat([integers, torch.randint(-1, 2, (1, *ids.shape))])
    expected = chained_loss_and_gradients([adapted], *inputs)
    [state] = compiled([adapted])
    assert_equal([adapted], expected, inputs)
    assert len(state.kinds) == 2
    assert graphs() == 3


def test_what_fails_runs_as_it_is(tmp_path: Path) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand more")

    make_folder(tiny_config("llama"), tmp_path)
    stages = load_chain(tmp_path, [0, 2, 4])
    inputs = batch()
    expected = chained_loss_and_gradients(stages, *inputs)
    lines: list[str] = []
    states = [
        compile_layers(stage.model, stage.span, usual=USUAL, backend=broken, warn=lines.append)  # type: ignore[arg-type]
        for stage in stages
    ]
    assert_equal(stages, expected, inputs)
    assert [line.split()[1] for line in lines] == ["LlamaDecoderLayer", "LlamaDecoderLayer", "LlamaRMSNorm"]
    assert all("no compiler here" in line for line in lines)
    assert all(state.failed for state in states)


def failing_backward(error: Exception) -> Any:
    """A compiler whose code works but for the backward pass, where it raises this when it is run."""

    def fail(*inputs: Any) -> Any:
        raise error

    return aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, inputs: make_boxed_func(fail),
    )


@pytest.mark.parametrize("way", [{}, *WAYS.values()] if SIZE > 1 else [WAYS["attention offloaded"]])
def test_what_fails_in_its_backward_pass_runs_as_it_is(tmp_path: Path, way: dict[str, Any]) -> None:
    make_folder(tiny_config("llama", attention_dropout=0.5, num_hidden_layers=2), tmp_path)
    [stage] = load_chain(tmp_path, [0, 2])
    batches = [batch(packed=True), batch(3, 20)]
    expected = []
    for inputs in batches:
        torch.manual_seed(0)
        expected.append(chained_loss_and_gradients([stage], *inputs))
    lines: list[str] = []
    apart = way.get("attention_only", False)
    backend = failing_backward(RuntimeError("no way back\nand more"))
    options: Any = {"usual": USUAL, "backend": backend, "warn": lines.append, "attention_apart": apart}
    state = compile_layers(stage.model, stage.span, **options)
    if way:
        checkpoint_activations(stage.model, stage.span, is_compiled=True, **way)
    for inputs, values in zip(batches, expected, strict=True):
        assert_equal([stage], values, inputs)
    names = ["LlamaDecoderLayer", *(["LlamaAttention"] * apart), "LlamaRMSNorm"]
    assert sorted(line.split()[1] for line in lines) == sorted(names)
    assert all(line.endswith("runs as it is: no way back") for line in lines)
    assert sorted(state.failed) == sorted(names)


def test_memory_that_runs_out_in_a_trial_is_no_fault_of_the_compiler(tmp_path: Path) -> None:
    make_folder(tiny_config("llama", num_hidden_layers=2), tmp_path)
    [stage] = load_chain(tmp_path, [0, 2])
    backend = failing_backward(torch.OutOfMemoryError("full"))
    compile_layers(stage.model, stage.span, usual=USUAL, backend=backend, warn=pytest.fail)
    with pytest.raises(torch.OutOfMemoryError):
        stage(batch())


def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a run; what it took is said once."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    make_folder(tiny_config("llama", num_hidden_layers=2), tmp_path)
    [stage] = load_chain(tmp_path, [0, 2])
    inputs = batch()
    expected = chained_loss_and_gradients([stage], *inputs)
    lines: list[str] = []
    compiled([stage], backend="inductor", tell=lines.append)
    # Its own way to set things for a while: after pytest's a setting is gone.
    with torch._inductor.config.patch(compile_threads=1):
        for _ in range(2):
            assert_equal([stage], expected, inputs)
    assert len(lines) == 1
    assert lines[0].startswith("compiled 2 kinds of layer in ")
