"""Weights in 4 and 8 bits on a stage: quantised while they are read, or read as they were stored.

A quantiser for transformers' own loading, which brings each tensor into the model's layout; what becomes of it is what
bitsandbytes makes of whole tensors, byte for byte, on the same kind of device.

A process that is left a slice of a weight keeps the bytes of that alone, whose values are those of the whole weight.

Guarantees: the modules and parameters of the plan are quantised, or loading ends with a mistake in one line; weights
and scales are finite; nothing that is kept is a mapped file.
Cost: the stage's own bytes, and beside them on CPU little (`jllm.models.weights.quantising`), on a GPU a tensor as it
is stored. Freed memory, and pages of the files, are given back after each tensor.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt
from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from jllm.errors import UserError
from jllm.models.weights.finite import check_finite
from jllm.models.weights.mapped import give_back, owned
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.quantising import (
    is_quantised,
    params_4bit,
    params_8bit,
    quantise_4bit,
    quantise_8bit,
    slice_4bit,
    slice_8bit,
)
from jllm.parallel.tensor.slices import Slice, mark_slice

_METHOD = "jllm_stage"


@register_quantization_config(_METHOD)
class StageQuantizationConfig(QuantizationConfigMixin):
    """What transformers hands to `StageQuantizer`.

    Args:
        plan: for the whole model.
        compute_dtype: of products.
        slices: what this process is left of parameters, by their names; all of those that are not there.
    """

    def __init__(
        self, plan: QuantisationPlan, compute_dtype: torch.dtype, slices: Mapping[str, Slice] | None = None
    ) -> None:
        self.quant_method = _METHOD  # type: ignore[assignment]
        self.plan, self.compute_dtype, self.slices = plan, compute_dtype, slices or {}


@register_quantizer(_METHOD)
class StageQuantizer(HfQuantizer):
    """Gives a stage bitsandbytes' modules, and these their weights, as transformers walks over the files.

    Attributes:
        plan: for the whole model.
    """

    def __init__(self, quantization_config: Any, **keywords: Any) -> None:
        self.plan: QuantisationPlan = quantization_config.plan
        self._compute_dtype: torch.dtype = quantization_config.compute_dtype
        self._slices: Mapping[str, Slice] = quantization_config.slices
        super().__init__(quantization_config, **keywords | {"pre_quantized": self.plan.quantisation.is_stored})
        self._extremes: list[tuple[str, Tensor]] = []
        self._misfits: list[tuple[str, list[int], list[int]]] = []
        self.unreadable: dict[str, Exception] = {}
        """Weights that a folder holds, and why they could not be read."""
        # A folder's weights in 4 bits have scales beside them under these names; those in 8 bits under others.
        scales = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        states = [f"quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")]
        four = ["weight", *(f"weight.{name}" for name in (*scales, *states))]
        eight = ["weight", "SCB", "weight_format"]
        self.serialized_names = {"weight": four if self.plan.quantisation.bits == 4 else eight}

    def __deepcopy__(self, memo: Any) -> "StageQuantizer":
        return self  # transformers copies what it calls for each weight, and this one keeps account of them all

    @property
    def quantized_element_size(self) -> float:
        return self.plan.quantisation.bytes_of_a_parameter

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        return param_name in self.plan.parameters

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Restore}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        # In 8 bits every product would say that its inputs are rounded to fp16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        for name in self.plan.modules:
            # A stage has stand-ins for what it does not own.
            if (replaced := _submodule(model, name)) is not None:
                model.set_submodule(name, self._quantised_module(replaced))

    def _quantised_module(self, replaced: nn.Module) -> nn.Module:
        how = self.plan.quantisation
        if isinstance(replaced, Conv1D):
            inputs, outputs = replaced.weight.shape
        else:
            assert isinstance(replaced, nn.Linear)
            inputs, outputs = replaced.in_features, replaced.out_features
        has_bias = replaced.bias is not None
        made: Any
        with torch.device("meta"):
            if how.bits == 8:
                made = Linear8bitLt(inputs, outputs, has_bias, has_fp16_weights=False, threshold=self.plan.threshold)
            else:
                made = Linear4bit(
                    inputs,
                    outputs,
                    has_bias,
                    self._compute_dtype,
                    compress_statistics=how.double,
                    quant_type=how.kind,
                )
                # Some processors would have the weights packed anew in an evaluation, which no training step reads.
                made.support_avx512bf16_for_cpu = False
            if has_bias:
                made.bias.data = made.bias.data.to(replaced.bias.dtype)
            if how.is_stored:
                made.weight.data = made.weight.data.to(torch.uint8 if how.bits == 4 else torch.int8)
        made.source_cls = type(replaced)
        made.requires_grad_(False)
        return cast(nn.Module, made)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        for name in self.plan.experts:
            parent, leaf = name.rpartition(".")[::2]
            module = _submodule(model, parent, any_kind=True)
            packed: Any = getattr(module, leaf, None)
            if module is not None and (state := getattr(packed, "quant_state", None)) is not None:
                replace_parameter_4bit_prequantized(module, leaf, state.as_dict(packed=True), packed.device)
        setattr(model, f"is_loaded_in_{self.plan.quantisation.bits}bit", True)  # which peft asks for
        return model

    def quantised(self, model: PreTrainedModel, name: str, value: Tensor) -> Any:
        """A whole tensor in the model's layout → the parameter that takes its place."""
        if name not in self.plan.parameters:
            return value
        module = model.get_submodule(name.rpartition(".")[0])
        if getattr(module, "source_cls", None) is not None and issubclass(module.source_cls, Conv1D):  # type: ignore[arg-type]
            value = value.T
        self._check(name, value.shape, _wanted_shape(model, name))
        self._extremes.append((name, torch.stack(torch.aminmax(value))))
        found = self._in_8bit(name, value) if self.plan.quantisation.bits == 8 else self._in_4bit(module, name, value)
        module._is_hf_initialized = True  # type: ignore[assignment]
        give_back(value)
        return self._marked(found, name)

    def _in_8bit(self, name: str, value: Tensor) -> Any:
        found = quantise_8bit(value)
        # bitsandbytes quantises what it has first made fp16 of, where large weights are infinite.
        self._extremes.append((f"{name} in fp16", torch.stack(torch.aminmax(found.SCB))))
        part = self._slices.get(name)
        return found if part is None else slice_8bit(found, part)

    def _in_4bit(self, module: nn.Module, name: str, value: Tensor) -> Any:
        how, part = self.plan.quantisation, self._slices.get(name)
        if part is not None and how.double:  # the scales' mean over the whole weight is taken off before
            packed, state = slice_4bit(*quantise_4bit(value, how), part)
        else:
            packed, state = quantise_4bit(value if part is None else part.seen_in(value), how)
        if name in self.plan.experts:
            held = nn.Parameter(packed, requires_grad=False)
            held.quant_state = state  # type: ignore[attr-defined]
            return held
        return params_4bit(module, packed, state)

    def _marked(self, parameter: Any, name: str) -> Any:
        if (part := self._slices.get(name)) is not None:
            mark_slice(parameter, part)
        return parameter

    def restored(self, model: PreTrainedModel, name: str, stored: dict[str, Any]) -> Any:
        """The tensors that a folder has of a quantised weight → the parameter.

        Raises:
            UserError: they do not belong together.
        """
        module: Any = model.get_submodule(name.rpartition(".")[0])
        part = self._slices.get(name)
        weight = stored.pop("weight") if part is not None else owned(stored.pop("weight"))  # a slice is copied below
        stored.pop("weight_format", None)
        values = {key: owned(tensor) for key, tensor in stored.items()}
        if not values or name not in self.plan.parameters:
            return weight
        shape = _wanted_shape(model, name)
        if self.plan.quantisation.bits == 8:
            self._check(name, weight.shape, shape)
            self._check(f"{name.removesuffix('weight')}SCB", values["SCB"].shape, torch.Size(shape[:1]))
            self._extremes.append((name, torch.stack(torch.aminmax(values["SCB"]))))
            module._is_hf_initialized = True
            held = params_8bit(weight, values["SCB"])
            if part is not None:
                held = slice_8bit(held, part)
                give_back(weight)
            return self._marked(held, name)
        state = QuantState.from_dict(values, device=weight.device)
        self._check(name, state.shape, shape)
        scales = state.state2.absmax if state.nested else state.absmax
        self._extremes.append((name, torch.stack(torch.aminmax(scales))))
        module._is_hf_initialized = True
        # Other types than bytes, which some folders have, would be taken for weights where a model is converted.
        packed = weight.view(torch.uint8).reshape(-1, 1)
        if part is not None:
            packed, state = slice_4bit(packed, state, part)
            give_back(weight)
        return self._marked(params_4bit(module, packed, state), name)

    def _check(self, name: str, found: torch.Size, wanted: torch.Size) -> None:
        if found != wanted:
            self._misfits.append((name, list(found), list(wanted)))

    @property
    def misfits(self) -> list[tuple[str, list[int], list[int]]]:
        """Name, shape and the shape that the configuration says, of what does not fit."""
        return self._misfits

    def check(self, model: PreTrainedModel, folder: str | Path) -> None:
        """See to it that all of the plan that the stage has is quantised, and finite.

        Raises:
            UserError: something is not.
        """
        for name, error in self.unreadable.items():
            raise UserError(
                f"{str(folder)!r} holds a {name} that bitsandbytes cannot read ({type(error).__name__}:"
                f" {' '.join(str(error).split())[:200]}); download the model again"
            )
        check_finite(self._extremes, folder)
        for name in sorted(self.plan.modules):
            module: Any = _submodule(model, name, any_kind=True)
            if isinstance(module, (Linear4bit, Linear8bitLt)) and not is_quantised(module.weight):
                raise UserError(self._unquantised(f"{name}.weight", folder))
        for name in sorted(self.plan.experts):
            parent, _, leaf = name.rpartition(".")
            module = _submodule(model, parent, any_kind=True)
            if leaf in getattr(module, "_parameters", {}):
                raise UserError(self._unquantised(name, folder))

    def _unquantised(self, name: str, folder: str | Path) -> str:
        if self.plan.quantisation.is_stored:
            return (
                f"config.json in {str(folder)!r} says that the weights are in {self.plan.quantisation}, and the files"
                f" have no scales for {name}; download the model again"
            )
        return f"{name} is stored together with what --skip_quant names; name all of it there, or none"


class _Quantise(ConversionOps):
    """What transformers calls with a tensor in the model's layout."""

    def __init__(self, quantizer: StageQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **_: Any) -> dict[str, Any]:  # type: ignore[override]
        found: dict[str, Any] = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            value = value[0] if isinstance(value, list) else value
            found[name] = self.quantizer.quantised(model, name, value)
        return found


class _Restore(ConversionOps):
    """What transformers calls with the tensors that a folder has of a weight, by their names within its module."""

    def __init__(self, hf_quantizer: StageQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **_: Any
    ) -> dict[str, Any]:
        assert full_layer_name is not None
        stored = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        if "weight" not in stored:
            return input_dict
        if len(stored) == 1 and full_layer_name not in self.hf_quantizer.plan.parameters:
            return input_dict
        try:
            return {"weight": self.hf_quantizer.restored(model, full_layer_name, dict(stored))}
        except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
            self.hf_quantizer.unreadable[full_layer_name] = error  # said when all is read
            return {"weight": stored["weight"]}


def _submodule(model: nn.Module, name: str, *, any_kind: bool = False) -> nn.Module | None:
    """A linear map (or, where asked for, any module) of a stage; None where it does not own it."""
    try:
        found = model.get_submodule(name)
    except AttributeError:
        return None
    return found if any_kind or isinstance(found, (nn.Linear, Conv1D)) else None


def _wanted_shape(model: PreTrainedModel, name: str) -> torch.Size:
    module: Any = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, nn.Linear):
        return torch.Size((module.out_features, module.in_features))
    return torch.Size(model.get_parameter(name).shape)
