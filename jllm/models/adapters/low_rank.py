"""What an adapter changes of a model's weights: products of thin factors, and tensors that take the place of others.

Peft's own layers, on the whole model without memory, say where each pair of factors belongs, how it is scaled and
which way round its weight lies; no weight of the model is needed for that.

Cost: the adapter in host memory, in fp32; a change of a weight is made some rows at a time.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.adapters.adapter_folder import PREFIX
from jllm.models.adapters.lora import attach_lora, is_adapter
from jllm.models.adapters.lora_plan import ADAPTER, targets_of
from jllm.models.adapters.peft_folder import check_adapter, name_in_base, read_adapter_config, read_tensors_of
from jllm.models.pipeline.carving import plain_name
from jllm.models.weights.finite import check_finite
from jllm.models.weights.source import bare_model


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The change of one weight: `scaling` * left @ right, for packed experts an expert at a time.

    Attributes:
        left: [rows, rank] or [experts, rows, rank], fp32.
        right: [rank, columns] or [experts, rank, columns], fp32.
        scaling: alpha over the rank, or over its root.
        magnitude: of DoRA, [rows] or, `by_column`, [columns]; None without.
        by_column: which way round the weight lies.
        copy: the weight itself as the adapter stores it beside an embedding's or a head's factors; None without.
    """

    left: Tensor
    right: Tensor
    scaling: float
    magnitude: Tensor | None = None
    by_column: bool = False
    copy: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Entries [start, stop) of the change along the first axis, without what a magnitude makes of it."""
        right = self.right[start:stop] if self.right.ndim == 3 else self.right
        return self.scaling * (self.left[start:stop] @ right)


@dataclass(frozen=True, kw_only=True)
class AdapterChanges:
    """All that an adapter changes, by names of the model's parameters.

    Attributes:
        config: of the adapter.
        low_rank: what is added.
        replaced: what takes the place of the model's own: modules that were trained whole, and biases.
    """

    config: LoraConfig
    low_rank: dict[str, LowRank]
    replaced: dict[str, Tensor]

    def unlike_sums(self) -> str | None:
        """What in it is no sum, so that it can neither be scaled nor taken away again; None where all of it is."""
        if any(each.magnitude is not None for each in self.low_rank.values()):
            return "DoRA, whose magnitudes divide by a norm"
        if self.replaced:
            return f"{min(self.replaced)}, trained whole"
        return None


def read_changes(folder: Path, origin: PretrainedConfig, family: type[PreTrainedModel], *, user: str) -> AdapterChanges:
    """What the adapter in `folder` changes of a model.

    Raises:
        UserError: it is no LoRA adapter, has settings that `user` does not have, or does not fit the model.
    """
    config = read_adapter_config(folder, user=user, allowed=("bias",))
    plan = targets_of(config, origin, family)
    check_adapter(folder, plan, origin=origin, family=family)
    whole = bare_model(origin, family, dtype=torch.float32)
    stored = read_tensors_of(folder, config, whole)
    check_finite(stored.items(), folder)
    parameters = {name for name, _ in whole.named_parameters(remove_duplicate=False)}
    replaced = {
        base: tensor
        for name, tensor in stored.items()
        if not is_adapter(name)
        and (base := name_in_base(name).removeprefix(PREFIX)) in parameters
        and (".base_layer." not in name or base.endswith(".bias"))
    }
    attach_lora(whole, plan, seed=0, dtype=torch.float32)
    low_rank = {}
    for name, layer in whole.named_modules():
        if isinstance(layer, LoraLayer):
            weight, change = _change_of(name, layer, stored)
            low_rank[weight] = change
    return AdapterChanges(config=config, low_rank=low_rank, replaced=replaced)


def _change_of(name: str, layer: LoraLayer, stored: dict[str, Tensor]) -> tuple[str, LowRank]:
    """The parameter that a layer of peft's adapts, and its change."""
    scaling = float(layer.scaling[ADAPTER])

    def part(leaf: str) -> Tensor:
        return stored[PREFIX + plain_name(f"{name}.{leaf}")].float()

    magnitude_name = PREFIX + plain_name(f"{name}.lora_magnitude_vector.{ADAPTER}.weight")
    magnitude = stored[magnitude_name].float() if magnitude_name in stored else None
    module = plain_name(f"{name}.weight").removesuffix(".weight").removesuffix(".base_layer")
    copy = stored.get(f"{PREFIX}{module}.base_layer.weight")
    if isinstance(layer, Embedding):
        left, right = part(f"lora_embedding_A.{ADAPTER}").T, part(f"lora_embedding_B.{ADAPTER}").T
        change = LowRank(left=left, right=right, scaling=scaling, magnitude=magnitude, by_column=True, copy=copy)
        return f"{module}.weight", change
    if not isinstance(layer, Linear | ParamWrapper):
        raise UserError(f"the adapter of {module} is a {type(layer).__name__}; only those of linear maps, embeddings"
                        " and packed experts are known")  # fmt: skip
    first, second = part(f"lora_A.{ADAPTER}.weight"), part(f"lora_B.{ADAPTER}.weight")
    if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
        rank = first.shape[0] // layer.num_experts
        by_expert = first.reshape(layer.num_experts, rank, -1)
        outputs = second.reshape(-1, rank, layer.num_experts).permute(2, 0, 1)
        swapped = layer._did_swap_in_out_features
        left, right = (outputs, by_expert) if swapped else (by_expert.mT, outputs.mT)
        return f"{module}.{layer.parameter_name}", LowRank(left=left, right=right, scaling=scaling)
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    by_column = bool(getattr(layer, "fan_in_fan_out", False))
    left, right = (first.T, second.T) if by_column else (second, first)
    return f"{module}.{leaf}", LowRank(
        left=left, right=right, scaling=scaling, magnitude=magnitude, by_column=by_column, copy=copy
    )
