"""Which weights of a model are held in 4 or 8 bits, decided on the whole model before any stage is there.

Linear maps of the decoder layers are quantised, and packed experts (one tensor for all experts of a layer) in 4 bits;
head, embedding and routers are not, nor what the family keeps in fp32. Of a folder that is quantised already, the rule
of transformers decides, which wrote it.

Guarantees: every stage decides alike. Needs no bitsandbytes.
Cost: the model without memory, once; some milliseconds for each layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from jllm.errors import UserError
from jllm.models.pipeline.structure import find_routers
from jllm.models.trainable import check_matches, grouped, is_inside, matches, patterns_of
from jllm.models.weights.source import bare_model, bitsandbytes_of
from jllm.parallel.tensor.slices import Slice

BLOCK, BLOCKS = 64, 256
"""Weights that share a scale of 4 bits; scales that share one where they are quantised too."""
OUTLIER_THRESHOLD = 6.0
"""Inputs beyond it are multiplied apart, beside weights in 8 bits (LLM.int8)."""


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How weights are held.

    Attributes:
        bits: 4 or 8.
        kind: of 4 bits, "nf4" or "fp4".
        double: of 4 bits, whether the scales are quantised too.
        skipped: patterns of what is left as it is, by commas; None: by default. Of a folder that is quantised already
            what its configuration says, and no patterns.
        is_stored: whether the folder is quantised already.
    """

    bits: int
    kind: str = "nf4"
    double: bool = True
    skipped: str | None = None
    is_stored: bool = False

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        return f"4 bits ({self.kind}, {'scales quantised too' if self.double else 'scales in fp32'})"

    @property
    def bytes_of_a_parameter(self) -> float:
        """With its share of the scales; those of 8 bits, one for each output, are left out."""
        if self.bits == 8:
            return 1.0
        return 0.5 + (1 / BLOCK + 4 / (BLOCK * BLOCKS) if self.double else 4 / BLOCK)


@dataclass(frozen=True, kw_only=True)
class QuantisationPlan:
    """What is quantised, by names of the whole model.

    Attributes:
        quantisation: how.
        modules: linear maps.
        experts: parameters that hold all experts of a layer.
        left_out: for people, a line each.
        threshold: for `OUTLIER_THRESHOLD`.
    """

    quantisation: Quantisation
    modules: frozenset[str]
    experts: frozenset[str]
    left_out: tuple[str, ...] = ()
    threshold: float = OUTLIER_THRESHOLD

    @property
    def parameters(self) -> frozenset[str]:
        """The names of all that is quantised."""
        return frozenset(f"{name}.weight" for name in self.modules) | self.experts

    def said(self) -> list[str]:
        """For people, a line each: what is quantised, and what is left as it is."""
        stored = "as the folder has them" if self.quantisation.is_stored else "quantised while they are loaded"
        packed = f" and {len(self.experts)} tensors of packed experts" if self.experts else ""
        lines = [f"{len(self.modules)} linear maps{packed} in {self.quantisation}, {stored}"]
        return lines + [f"not quantised: {line}" for line in self.left_out]


def stored_quantisation(folder: Path) -> Quantisation | None:
    """How a model folder is quantised with bitsandbytes; None where it is not, or where nothing can be read."""
    found = bitsandbytes_of(folder)
    if found is None:
        return None
    if found.get("load_in_8bit"):
        return Quantisation(bits=8, is_stored=True)
    kind, double = found.get("bnb_4bit_quant_type", "fp4"), found.get("bnb_4bit_use_double_quant", False)
    return Quantisation(bits=4, kind=str(kind), double=bool(double), is_stored=True)


def plan_quantisation(
    config: PretrainedConfig, family: type[PreTrainedModel], quantisation: Quantisation, *, folder: Path
) -> QuantisationPlan:
    """What of a model is quantised.

    Args:
        config, family: of the model.
        quantisation: how.
        folder: of the model.

    Raises:
        UserError: a pattern that matches nothing, or nothing that could be quantised.
    """
    model = bare_model(config, family, dtype=torch.float32)
    maps = {name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)}
    kept = list(model._keep_in_fp32_modules or ())
    if quantisation.is_stored:
        said = bitsandbytes_of(folder) or {}
        skipped = said.get("llm_int8_skip_modules")
        names = [*(get_keys_to_not_convert(model) if skipped is None else skipped), *kept]
        return QuantisationPlan(
            quantisation=quantisation,
            modules=frozenset(name for name in maps if should_convert_module(name, names)),
            experts=frozenset(),
            threshold=float(said.get("llm_int8_threshold", OUTLIER_THRESHOLD)),
        )
    names = [*get_keys_to_not_convert(model), *kept]
    routers = {name for name in maps if is_inside(name, find_routers(model))}
    modules = {name for name in maps if should_convert_module(name, names)} - routers
    packed = {name for name in _packed(model) if should_convert_module(name, kept)}
    patterns = patterns_of("--skip_quant", quantisation.skipped)
    matrices = [name for name, each in model.named_parameters(remove_duplicate=False) if each.ndim > 1]
    for pattern in patterns:
        check_matches("--skip_quant", pattern, matrices)
    default = maps - modules
    modules -= {name for name in modules if any(matches(pattern, f"{name}.weight") for pattern in patterns)}
    experts = {name for name in packed if not any(matches(pattern, name) for pattern in patterns)}
    if quantisation.bits == 8:
        experts = set()
    if not modules and not experts:
        raise UserError(
            f"--load_in_{quantisation.bits}bit leaves nothing that could be quantised"
            + (f" with --skip_quant {quantisation.skipped!r}; name less there" if patterns else "; drop it")
        )
    left = default | (packed - experts) | {name for name in maps - default if name not in modules}
    return QuantisationPlan(
        quantisation=quantisation,
        modules=frozenset(modules),
        experts=frozenset(experts),
        left_out=(grouped(left),) if left else (),
    )


def check_slices(plan: QuantisationPlan, slices: Mapping[str, Slice], given: str) -> None:
    """See to it that rows of slices in 4 bits are whole blocks: so slices have the whole weight's values.

    Where blocks are cut, a slice would be quantised otherwise than the whole weight. Where they go over the ends of
    rows, bitsandbytes takes wrong scales on CPU.

    Args:
        plan: what is quantised.
        slices: of parameters, by their names.
        given: the option that asks for them.

    Raises:
        UserError: one has not.
    """
    if plan.quantisation.bits != 4:
        return
    quantised = {name: part for name, part in slices.items() if name in plan.parameters}
    cut = [name for name, part in quantised.items() if part.local_shape[-1] % BLOCK or part.in_blocks(BLOCK) is None]
    if cut:
        where = "the folder of the model in bf16" if plan.quantisation.is_stored else "--skip_quant for those"
        raise UserError(
            f"{given}: {grouped(cut)} in 4 bits would have rows of {quantised[cut[0]].local_shape[-1]} weights in a"
            f" slice, and {BLOCK} in a row share a scale; give another number, or {where}"
        )


def _packed(model: PreTrainedModel) -> set[str]:
    """Parameters that hold all experts of a layer, by the names that families give them or their modules."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and "expert" in f"{name} {type(module).__name__}".lower()
    }
