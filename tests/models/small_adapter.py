"""A small real adapter for tests: a linear map beside a decoder layer, registered on it, added to what it returns."""

from collections.abc import Collection

import torch
from torch import nn
from transformers import PreTrainedModel

from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan


def attach_adapters(model: PreTrainedModel, span: StageSpan, layers: Collection[int]) -> list[str]:
    """Give those of `layers` that the stage has an adapter, the same whatever the stages; their parameters' names."""
    listed = structure_of(model).layers
    names = []
    for index in sorted(set(layers) & set(range(span.first_layer, span.end_layer))):
        layer = model.get_submodule(f"{listed}.{index}")
        width = model.config.hidden_size
        adapter = nn.Linear(width, width, bias=False, dtype=model.dtype, device=model.device)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            adapter.weight.copy_(0.02 * torch.randn(width, width, generator=generator))
        layer.adapter = adapter
        layer.register_forward_hook(lambda module, inputs, output: output + module.adapter(output))
        names.append(f"{listed}.{index}.adapter.weight")
    return names
