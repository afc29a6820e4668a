"""Measured layer times for `--partition_method profile`.

Times one layer of each kind (class, layer type, size), the first stage's beginning and the last stage's end, forward
and backward, on one device with random weights and input. Attention masks and rotary tables are timed with each layer,
though a stage makes them once. Micro-batches are full and hold one document a row. Where stages may be cut inside
layers, both halves of a layer of each kind are timed, too, and the layer's time is divided as theirs are.

The seconds are kept in a cache file whose name is a hash of everything that they depend on, so a second run with the
same model, shapes, dtype, device and versions reads them. One that cannot be read or believed is measured anew
(`jllm.guards.caches`).

Costs: one layer of each kind in memory at a time, some dozen passes each; seconds. One process must measure and tell
the others: two processes may measure differently, and all must cut the model alike.
"""

import contextlib
import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from jllm.guards import caches, notation
from jllm.models.activation_checkpointing import checkpoint_activations, find_attention
from jllm.models.compiled import Shape, compile_layers
from jllm.models.families import check_split
from jllm.models.pipeline.bundle import POSITION_IDS
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.costs import Costs, with_timings
from jllm.models.pipeline.span import StageSpan, spans_of
from jllm.models.pipeline.stage import Objective, PipelineStage
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.loading import init_stage

# Raised when what is measured, or how, changes: older files are then left alone.
_FORMAT = 5
_WARM_UP, _REPEATS = 2, 5


def default_cache() -> Path | None:
    """Where measured times are kept: `jllm/layer-times` in the user's cache folder; None where the user has none."""
    return caches.place("layer-times")


def measure_costs(
    config: PretrainedConfig,
    costs: Costs,
    *,
    objective: Objective,
    sequence_length: int,
    micro_batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    checkpoint_interval: int = 0,
    checkpoint_attention: bool = False,
    family: type[PreTrainedModel] | None = None,
    is_compiled: bool = False,
    cache: Path | None = None,
    is_fused: bool = False,
    prepare: Callable[[PreTrainedModel, StageSpan], None] | None = None,
    prepared: str = "off",
) -> Costs:
    """`costs` with seconds in place of estimated time.

    `objective` is what the last stage of the run computes, `is_fused` whether with the head's product. `cache` is the
    folder of kept times; None measures anew and stores nothing. `checkpoint_interval` and `checkpoint_attention` are
    those of `jllm.models.activation_checkpointing`, `is_compiled` says whether layers are compiled. `prepare` does to a
    stage's model what the run does before that, and `prepared` is its name.

    Raises:
        UserError: the model cannot be split at all.
    """
    check_split(config, spans_of([0, 1, count_layers(config)])[0])
    device = torch.device(device)
    about = {
        "format": _FORMAT,
        "config": config.to_diff_dict(),
        "layers": len(costs.of_layers().layers),
        "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "dtype": str(dtype),
        "device": _device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "attention": attn_implementation,
        "is_fused": is_fused,
        "is_recomputed": bool(checkpoint_interval),
        "is_attention_recomputed": checkpoint_attention,
        "is_compiled": is_compiled,
        "prepared": prepared,
        "in_halves": costs.in_halves,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    described = json.dumps(about, sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode()).hexdigest()
    stored = cache / f"{digest[:32]}{caches.SUFFIX}" if cache is not None else None
    times = _read_times(stored, costs, described) if stored is not None else None
    if times is None:
        batch = (micro_batch_size, sequence_length)
        # What layers hand on, learned from the first stage: some families hand on more than one stream.
        hidden = torch.Size()

        def seconds(span: StageSpan) -> float:
            nonlocal hidden
            model = init_stage(
                config,
                span,
                dtype=dtype,
                seed=0,
                device=device,
                attn_implementation=attn_implementation,
                family=family,
            )
            if prepare is not None:
                prepare(model, span)
            has_attention = bool(
                find_attention(model.get_submodule(f"{structure_of(model).layers}.{span.first_layer}"))
            )
            if is_compiled:
                compile_layers(
                    model, span, usual=Shape(*batch), attention_apart=checkpoint_attention, tell=_nothing, warn=_nothing
                )
            if has_attention if checkpoint_attention else checkpoint_interval:
                # Each layer runs again once, however many a group has; so groups of one show what a layer costs.
                checkpoint_activations(model, span, attention_only=checkpoint_attention, is_compiled=is_compiled)
            median, handed_on = _time_stage(PipelineStage(model, span, objective), batch, hidden)
            if span.is_first:
                hidden = handed_on
            return median

        times = _measure(costs, seconds)
        if device.type == "cuda":
            # The run's own stage wants this memory, and its peak is to be its own.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        if stored is not None:
            caches.write(stored, json.dumps({**times, "about": described}).encode())
    layers = times["layers"]
    if costs.in_halves:
        shares = zip(layers, times["first_halves"], strict=True)
        layers = [half for whole, share in shares for half in (whole * share, whole * (1 - share))]
    return with_timings(costs, layers=layers, embedding=times["embedding"], head=times["head"])


def _measure(costs: Costs, seconds: Callable[[StageSpan], float]) -> dict[str, Any]:
    """Seconds of every layer, of the embedding and of the head, and with half layers the share that the first one has
    of each layer; `seconds` times one span, the first one first."""
    estimated = costs.of_layers().layers
    kinds = [(layer.kind, layer.parameters.total) for layer in estimated]
    last = len(kinds) - 1
    beginning = seconds(StageSpan(index=0, count=2, first_layer=0, end_layer=1))
    by_kind: dict[tuple[str, int], float] = {}
    shares: dict[tuple[str, int], float] = {}
    for index, kind in enumerate(kinds):
        # Layers 0 and `last` are never alone: the embedding and the head are on their stages.
        if kind not in by_kind and 0 < index < last:
            alone = StageSpan(index=1, count=3, first_layer=index, end_layer=index + 1)
            by_kind[kind] = seconds(alone)
            if costs.in_halves:
                first, second = (seconds(replace(alone, **{side: True})) for side in ("ends_inside", "starts_inside"))
                shares[kind] = first / (first + second)
    end = seconds(StageSpan(index=1, count=2, first_layer=last, end_layer=last + 1))
    # A kind that only the first or the last layer has keeps the whole time of that stage: what it shares it with is
    # never elsewhere.
    layers = [by_kind.get(kind, beginning if index == 0 else end) for index, kind in enumerate(kinds)]
    # A kind that is nowhere in between is divided by the estimates.
    halves = zip(kinds, costs.layers[::2], estimated, strict=True) if costs.in_halves else ()
    return {
        "layers": layers,
        "first_halves": [shares.get(kind, first.time / whole.time) for kind, first, whole in halves],
        "embedding": max(0.0, beginning - layers[0]),
        "head": max(0.0, end - layers[last]),
    }


def _read_times(path: Path, costs: Costs, about: str) -> dict[str, Any] | None:
    """What `measure_costs` stored about this; None where there is nothing, or nothing sound."""
    content = caches.read(path)
    if content is None:
        return None
    try:
        times: dict[str, Any] = notation.loads(content)
        numbers = [*times["layers"], *times["first_halves"], times["embedding"], times["head"]]
        wanted = len(costs.of_layers().layers)
        is_sound = len(times["layers"]) == wanted and len(times["first_halves"]) == wanted * costs.in_halves
        is_sound = (
            is_sound
            and all(math.isfinite(n) and n >= 0 for n in numbers)
            and max(times["first_halves"], default=0) <= 1
        )
        return times if is_sound and all(times["layers"]) and times["about"] == about else None
    except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _time_stage(stage: PipelineStage, batch: tuple[int, int], hidden: torch.Size) -> tuple[float, torch.Size]:
    """(median seconds of a forward and backward pass, shape of the result) on input of shape `batch` or `hidden`.

    The process's own random numbers are left alone.
    """
    parameter = next(stage.parameters())
    device = parameter.device
    samples = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        ids = torch.randint(stage.model.config.get_text_config(decoder=True).vocab_size, batch, device=device)
        positions = torch.arange(batch[1], device=device).expand(batch)
        planes = torch.stack([positions if name == POSITION_IDS else ids for name in stage.receives])
        for _ in range(_WARM_UP + _REPEATS):
            received = ids
            if not stage.span.is_first:
                received = torch.randn(hidden, dtype=parameter.dtype, device=device, requires_grad=True)
            _wait(device)
            start = time.perf_counter()
            output = stage((received, planes))
            result = output if isinstance(output, Tensor) else output[0]
            result.backward(None if result.dim() == 0 else torch.ones_like(result))
            _wait(device)
            samples.append(time.perf_counter() - start)
            stage.zero_grad()
    return statistics.median(samples[_WARM_UP:]), result.shape


def _nothing(line: str) -> None:
    """Say nothing: the run tells how its own layers are compiled."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
