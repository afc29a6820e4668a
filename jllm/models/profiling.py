"""Measured layer times for `--partition_method profile`.

Times one layer of each kind (class, layer type, size), the embedding and the head, forward and backward, on one device
with random weights and input, and keeps the result in a cache file: the second run with the same model, shapes, dtype
and device reads it. Attention masks and rotary tables are timed with each layer, though a stage makes them once.

Costs: one layer of each kind in memory at a time, some dozen passes each; seconds. One process measures and tells the
others: two processes may measure differently, and all must cut the model alike.
"""

import hashlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from jllm.models.anatomy import count_layers
from jllm.models.costs import Costs, with_timings
from jllm.models.stage import PipelineStage, StageSpan
from jllm.models.weights import init_stage

CACHE = Path("~/.cache/jllm/layer-times")
_WARM_UP, _REPEATS = 2, 5


def measure_costs(
    config: PretrainedConfig,
    costs: Costs,
    *,
    sequence_length: int,
    micro_batch_size: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    checkpoint_interval: int = 0,
    cache: Path | None = CACHE,
) -> Costs:
    """`costs` with seconds in place of estimated time. `cache=None` measures anew and stores nothing."""
    device = torch.device(device)
    about = {
        "config": config.to_diff_dict(),
        "sequence_length": sequence_length,
        "micro_batch_size": micro_batch_size,
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
        "threads": torch.get_num_threads() if device.type == "cpu" else 0,
        "attention": attn_implementation,
        "checkpoint_interval": checkpoint_interval,
        "torch": torch.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    stored = cache.expanduser() / f"{digest[:32]}.json" if cache else None
    if stored is not None and stored.is_file():
        times = json.loads(stored.read_text(encoding="utf-8"))
        return with_timings(costs, layers=times["layers"], embedding=times["embedding"], head=times["head"])

    def seconds(first: int, end: int, index: int, count: int) -> float:
        span = StageSpan(index=index, count=count, first_layer=first, end_layer=end)
        model = init_stage(config, span, dtype=dtype, seed=0, device=device, attn_implementation=attn_implementation)
        if checkpoint_interval:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return _time_stage(PipelineStage(model, span, _sum_of_log_probabilities), sequence_length, micro_batch_size)

    layers = count_layers(config)
    by_kind: dict[tuple[str, int], float] = {}
    times_of_layers = []
    for index, layer in enumerate(costs.layers):
        kind = (layer.kind, layer.parameters)
        # The entrance of a stage is layer 0's stand-in, so layer 0 itself is timed through a layer of its kind.
        if kind not in by_kind and 0 < index < layers - 1:
            by_kind[kind] = seconds(index, index + 1, 1, 3)
        times_of_layers.append(kind)
    typical = statistics.median(by_kind.values()) if by_kind else 0.0
    times = {"layers": [by_kind.get(kind, typical) for kind in times_of_layers], "embedding": 0.0, "head": 0.0}
    if layers > 1:
        times["embedding"] = max(0.0, seconds(0, 1, 0, 2) - times["layers"][0])
        times["head"] = max(0.0, seconds(layers - 1, layers, 1, 2) - times["layers"][-1])
    if stored is not None:
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**times, "about": about}, default=str), encoding="utf-8")
        os.replace(temporary, stored)
    return with_timings(costs, layers=times["layers"], embedding=times["embedding"], head=times["head"])


def _time_stage(stage: PipelineStage, sequence_length: int, micro_batch_size: int) -> float:
    """Median seconds of a forward and backward pass."""
    parameter = next(stage.parameters())
    shape = (micro_batch_size, sequence_length)
    ids = torch.zeros(shape, dtype=torch.long, device=parameter.device)
    positions = torch.arange(sequence_length, device=parameter.device).expand(shape)
    integers = torch.stack([ids, positions])
    hidden_size = stage.model.config.get_text_config(decoder=True).hidden_size
    samples = []
    for _ in range(_WARM_UP + _REPEATS):
        received = ids
        if not stage.span.is_first:
            received = torch.randn(*shape, hidden_size, dtype=parameter.dtype, device=parameter.device)
            received.requires_grad_()
        _wait(parameter.device)
        start = time.perf_counter()
        output = stage((received, integers))
        result = output if isinstance(output, Tensor) else output[0]
        result.backward(None if result.dim() == 0 else torch.ones_like(result))
        _wait(parameter.device)
        samples.append(time.perf_counter() - start)
        stage.zero_grad()
    return statistics.median(samples[_WARM_UP:])


def _sum_of_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """Costs what a cross entropy costs."""
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
