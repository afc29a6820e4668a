"""LoRA on a stage: peft's own layers, where the plan for the whole model puts them.

Attach after the stage is loaded and sealed, and before activation checkpointing wraps its layers. The first matrices
are drawn from (seed, name in the whole model), so any number of stages and slices starts alike; the second ones are 0.

Adapters are kept in a type of their own, fp32 as a rule, and multiply in it, or in that of what comes in, as under
`torch.autocast`: on a GPU fp32 products of adapters take a quarter of a step beside a bf16 model. DoRA's, which norms
are made of, stay in the adapters' own type.

Guarantees: before the first step the stage computes what it computed without adapters. The stage's parameters keep
their names (`jllm.models.pipeline.carving.plain_name`), those of the adapters are the ones in peft's file.
Cost: rank × (inputs + outputs) numbers for each module.
"""

import contextlib
import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.models.adapters.lora_plan import ADAPTER, LoraPlan
from jllm.models.pipeline.carving import plain_name
from jllm.models.weights.initial import derived_seed
from jllm.parallel.tensor.slices import slice_of

_HOLDER = "model"


def attach_lora(
    model: PreTrainedModel,
    plan: LoraPlan,
    *,
    seed: int,
    dtype: torch.dtype,
    multiplies_in_model_type: bool = False,
) -> None:
    """Give a stage those adapters of `plan` whose modules it has.

    Args:
        model: loaded and sealed.
        plan: for the whole model.
        seed: of the first matrices.
        dtype: of the adapters.
        multiplies_in_model_type: whether their products are in the type of what comes in; not with DoRA.
    """
    assert not (multiplies_in_model_type and plan.config.use_dora)
    own = {name for name, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    parameters = {name for name, _ in model.named_parameters()}
    modules = [name for name in plan.modules if name in own]
    packed = [name for name in plan.parameters if name in parameters]
    if modules or packed:
        _inject(model, plan, modules, packed)
    for name in plan.saved:
        if any(name == each or each.startswith(name + ".") for each in own):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, ModulesToSaveWrapper(model.get_submodule(name), ADAPTER))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and model.device.type != "meta":
            _draw(name, module, seed=seed, gaussian=plan.config.init_lora_weights == "gaussian")
        if isinstance(module, LoraLayer) and multiplies_in_model_type:
            _multiply_in_input_type(module)
    for name, parameter in model.named_parameters():
        trains = is_adapter(name) or ".modules_to_save." in name
        if trains:
            parameter.data = parameter.data.to(dtype)
        if parameter.is_floating_point():
            parameter.requires_grad_(trains)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Compute what the stage's model computes without its adapters, and with the modules that are trained whole as they
    were.

    peft's own switch also turns gradients off and on again; here nothing but what a forward pass does changes.
    """
    found: list[Any] = [each for each in model.modules() if isinstance(each, LoraLayer | ModulesToSaveWrapper)]
    before = [each._disable_adapters for each in found]
    for each in found:
        each._disable_adapters = True
    try:
        yield
    finally:
        for each, was in zip(found, before, strict=True):
            each._disable_adapters = was


def is_adapter(name: str) -> bool:
    """Whether a parameter, by its name in a model, belongs to a LoRA layer."""
    return any(part.startswith("lora_") for part in name.split("."))


class InputTypeLinear(nn.Linear):
    """A linear map that multiplies in the type of its input, whatever its own is."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


def _multiply_in_input_type(layer: LoraLayer) -> None:
    """Have the two maps of an adapter take what comes in as it is; packed parameters multiply theirs by themselves."""
    if isinstance(layer, ParamWrapper):
        return
    layer.cast_input_dtype_enabled = False
    for maps in (layer.lora_A, layer.lora_B):
        given = dict(maps).get(ADAPTER)
        if isinstance(given, nn.Linear):
            taken = InputTypeLinear(given.in_features, given.out_features, given.bias is not None, device="meta")
            taken.weight, taken.bias = given.weight, given.bias
            maps[ADAPTER] = taken.train(given.training)


def _inject(model: PreTrainedModel, plan: LoraPlan, modules: list[str], packed: list[str]) -> None:
    """Put peft's layers into the model, by explicit names.

    Inside a holder without a configuration peft leaves names as they are; with one it rewrites them for some families,
    which has been done for the whole model, and would fail here for modules that are on other stages.
    """
    holder = nn.Module()
    setattr(holder, _HOLDER, model)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(holder, flag, getattr(model, flag, False))
    config = copy.deepcopy(plan.config)
    config.target_modules = [f"{_HOLDER}.{name}" for name in modules]
    config.target_parameters = [f"{_HOLDER}.{name}" for name in packed] or None
    config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of targets that this stage does not have
        inject_adapter_in_model(config, holder, ADAPTER, low_cpu_mem_usage=model.device.type == "meta")


@torch.no_grad()
def _draw(name: str, layer: Any, *, seed: int, gaussian: bool) -> None:
    """Initial values as peft's, each first matrix from a seed of its own."""
    rank = layer.r[ADAPTER]
    if ADAPTER in layer.lora_A:
        matrix = layer.lora_A[ADAPTER].weight
        generator = _generator(seed, plain_name(f"{name}.lora_A.{ADAPTER}.weight"))
        weight = getattr(layer.get_base_layer(), "weight", None)  # packed experts have none
        held = slice_of(weight) if isinstance(weight, Tensor) else None
        inputs = held.shape[1] if held is not None and held.axis == 1 else matrix.shape[1]
        drawn = torch.empty(matrix.shape[0], inputs, dtype=torch.float32)
        if gaussian:
            drawn.normal_(std=1 / rank, generator=generator)
        else:
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
        if held is not None and held.axis == 1:
            drawn = dataclasses.replace(held, shape=tuple(drawn.shape)).of(drawn)
        matrix.copy_(drawn)
        layer.lora_B[ADAPTER].weight.zero_()
    else:
        layer.lora_embedding_A[ADAPTER].zero_()
        generator = _generator(seed, plain_name(f"{name}.lora_embedding_B.{ADAPTER}"))
        matrix = layer.lora_embedding_B[ADAPTER]
        matrix.copy_(torch.empty(matrix.shape, dtype=torch.float32).normal_(generator=generator))


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, name))
