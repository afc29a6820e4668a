"""Adapters beside quantised weights: in slices, and on a plain model that has the same values in fp32."""

import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jllm.models.weights.quantisation import Quantisation, QuantisationPlan

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "initializer_range": 0.1}
"""Rows of which slices have whole blocks of 64 weights."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with adapters.

    Attributes:
        family, settings: of the model.
        how: of its weights.
        targets: what has adapters.
        is_stored: whether its folder is quantised already.
    """

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    how: Quantisation = field(default_factory=lambda: Quantisation(bits=4))
    targets: str = "all-linear"
    is_stored: bool = False

    def write(self, folder: Path) -> None:
        """The model's folders: of plain weights, and of quantised ones where those are stored."""
        import torch
        from transformers import AutoModelForCausalLM

        from tests.models.family_check import make_folder
        from tests.models.tiny import tiny_config
        from tests.models.weights.by_bitsandbytes import whole

        torch.manual_seed(0)
        make_folder(tiny_config(self.family, **WIDE | self.settings), folder)
        if any("bias" in name for name in self.settings):  # they are 0 at first
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter, std=0.3)
            model.save_pretrained(folder)
        if self.is_stored:
            whole(folder, self.how).save_pretrained(self.stored(folder))

    def stored(self, folder: Path) -> Path:
        """The folder that is loaded in few bits."""
        return folder.with_name(f"{folder.name}-stored") if self.is_stored else folder

    def plan(self, folder: Path) -> QuantisationPlan:
        """What of the model is quantised."""
        from jllm.models.weights.quantisation import plan_quantisation, stored_quantisation
        from jllm.models.weights.source import causal_class, read_config

        origin = self.stored(folder)
        how = stored_quantisation(origin) or self.how
        config = read_config(origin, quantised=True)
        return plan_quantisation(config, causal_class(config), how, folder=origin)

    def load(self, folder: Path, group: Any = None) -> Any:
        """The quantised model, or a rank's slices of it."""
        import torch

        from jllm.models.tensor_parallel.slicing import slice_stage
        from jllm.models.weights.loading import load_stage

        cut = None if group is None else partial(slice_stage, group=group)
        plan = self.plan(folder)
        return load_stage(self.stored(folder), self._span, dtype=torch.float32, quantisation=plan, cut=cut)

    def plain(self, folder: Path) -> Any:
        """The plain model, with the values of the quantised one."""
        import torch

        from jllm.models.weights.loading import load_stage

        model = load_stage(folder, self._span, dtype=torch.float32)
        with torch.no_grad():
            for name, (value, _) in values_of(self.load(folder)).items():
                model.get_parameter(name).copy_(value)
        return model

    def adapt(self, model: Any, group: Any = None) -> Any:
        """Give a model adapters, whose numbers come from their names."""
        import torch

        from jllm.models.adapters.lora import attach_lora, is_adapter
        from jllm.models.adapters.lora_plan import LoraChoice, plan_lora
        from jllm.models.pipeline.carving import plain_name
        from jllm.models.tensor_parallel.adapters import slice_adapters
        from jllm.models.weights.source import causal_class
        from jllm.parallel.tensor.slices import slice_of, whole_shape

        choice = LoraChoice(rank=4, alpha=8, targets=self.targets)
        attach_lora(model, plan_lora(model.config, causal_class(model.config), choice), seed=0, dtype=torch.float32)
        if group is not None:
            slice_adapters(model, group)
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                generator = torch.Generator().manual_seed(zlib.crc32(plain_name(name).encode()))
                drawn, part = torch.randn(whole_shape(parameter), generator=generator) * 0.1, slice_of(parameter)
                parameter.data.copy_(drawn if part is None else part.of(drawn))
        return model

    @property
    def _span(self) -> Any:
        from jllm.models.pipeline.span import spans_of

        return spans_of([0, 4])[0]


def values_of(model: Any) -> dict[str, tuple[Any, Any]]:
    """What quantised weights stand for, by their published names, and what of the whole they are."""
    from bitsandbytes.functional import dequantize_4bit

    from jllm.models.pipeline.carving import plain_name
    from jllm.parallel.tensor.slices import slice_of

    found = {}
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        holder = owner[0] if name.endswith(".original") else parameter  # of packed experts, beside it
        if (state := getattr(holder, "quant_state", None)) is not None:
            found[plain_name(name)] = (dequantize_4bit(parameter.data, state), slice_of(parameter))
        elif (scales := getattr(parameter, "SCB", None)) is not None:
            found[plain_name(name)] = (parameter.data.float() * (scales[:, None] / 127), slice_of(parameter))
    return found
