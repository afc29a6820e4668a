"""Linear maps of decoder layers that multiply in 8-bit floats, through torchao.

Each of a map's three products (its output, the gradients of its input and of its weight) takes its factors in fp8,
scaled anew each time by the largest number of the tensor (`tensorwise`) or of each row (`rowwise`); sums are made in
more bits, and products come out in the model's own type. `rowwise_with_gw_hp` makes the weight's gradient in that type
as without.

Guarantees: parameters stay what they are, the objects too; so do their names, gradients' types, and what is saved.
Embedding, head, norms, routers, packed experts and attention's own products stay in the model's type.
Cost: two passes over each factor, which pay where layers are compiled and matrices large. Saved activations are as
without; a layer's fp8 copies live as long as its products.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.trainable import is_inside

MULTIPLE = 16
"""The kernels take matrices whose sizes are multiples of this."""


class LinearMaps(NamedTuple):
    """How many linear maps there are in a stage's decoder layers, and how many of them multiply in fp8."""

    total: int
    in_fp8: int


def use_fp8(model: PreTrainedModel, span: StageSpan, recipe: str, *, is_emulated: bool = False) -> None:
    """Have the linear maps of this stage's decoder layers multiply in fp8, where their sizes allow it.

    Call before layers are compiled, and before anything is hooked to their maps.

    Args:
        model: loaded and sealed, in bf16, or without memory.
        span: of the stage.
        recipe: torchao's name of it.
        is_emulated: whether products are made in fp32 of what fp8 left, as tests on CPU have it.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # here: few installations have it

    config = dataclasses.replace(
        # Micro-batches may have any number of tokens, over which the weight's gradient sums.
        Float8LinearConfig.from_recipe_name(recipe),
        pad_inner_dim=True,
        emulate=is_emulated,
    )
    routers = structure_of(model).routers
    for prefix, layer in _layers(model, span):

        def is_chosen(module: nn.Module, name: str, prefix: str = prefix) -> bool:
            return _fits(module) and not is_inside(f"{prefix}.{name}", routers)

        convert_to_float8_training(layer, config=config, module_filter_fn=is_chosen)


def count_maps(model: PreTrainedModel, span: StageSpan) -> LinearMaps:
    """The linear maps of this stage's decoder layers."""
    maps = [each for _, layer in _layers(model, span) for each in layer.modules() if isinstance(each, nn.Linear)]
    return LinearMaps(total=len(maps), in_fp8=sum(type(each).__module__.startswith("torchao.") for each in maps))


def _layers(model: PreTrainedModel, span: StageSpan) -> list[tuple[str, nn.Module]]:
    container = structure_of(model).layers
    names = [f"{container}.{index}" for index in range(span.first_layer, span.end_layer)] if container else []
    return [(name, model.get_submodule(name)) for name in names]


def _fits(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear  # others do more
        and module.weight.dtype == torch.bfloat16
        and not any(size % MULTIPLE for size in module.weight.shape)
    )
