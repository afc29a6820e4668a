"""The products BA of a stage's LoRA adapters: their norms, their decay, and a limit for them.

The norm that is meant is Frobenius', of what is added to the weight: scale x BA, scale being alpha over the rank (or
over its root). Packed experts have a product each. With G = BᵀB and H = AAᵀ, both rank x rank,
|BA|² = Σ (G ⊙ H); the product itself, as large as the weight, is never formed.

Guarantees: every process that holds the same adapters changes them alike. Cost: a copy of the adapters while the
products are looked at, and rank² numbers for each, which are summed over the slices of a stage; adapters of one shape
are one batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from jllm.models.adapters.lora_plan import ADAPTER
from jllm.models.tensor_parallel.marks import repeats
from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.layers import RowParallelLinear
from jllm.parallel.tensor.slices import slice_of


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Product:
    """One product.

    Attributes:
        name: of the module that has the adapter.
        scale: what BA is multiplied by.
        owners: the parameters that hold A and B.
        expert, experts: which of how many share them.
    """

    name: str
    scale: float
    owners: tuple[nn.Parameter, nn.Parameter]
    expert: int = 0
    experts: int = 1

    @property
    def label(self) -> str:
        """For people."""
        return self.name if self.experts == 1 else f"{self.name}, expert {self.expert}"

    # Looked up anew each time: DeepSpeed gives parameters other memory. peft keeps an expert's ranks together in A, and
    # the experts of a rank together in B.

    @property
    def first(self) -> Tensor:
        """A, [rank, inputs], a view of the adapter's weights."""
        first = self.owners[0].detach()
        return first.view(self.experts, -1, first.shape[1])[self.expert]

    @property
    def second(self) -> Tensor:
        """B, [outputs, rank], likewise."""
        second = self.owners[1].detach()
        return second.view(second.shape[0], -1, self.experts)[:, :, self.expert]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Batch:
    """Products of one shape."""

    products: Sequence[Product]

    def first(self) -> Tensor:
        """[n, rank, inputs], fp32."""
        return torch.stack([each.first for each in self.products]).float()

    def second(self) -> Tensor:
        """[n, outputs, rank], fp32."""
        return torch.stack([each.second for each in self.products]).float()

    def scales(self, like: Tensor) -> Tensor:
        """[n]."""
        return like.new_tensor([each.scale for each in self.products])


class LoraProducts:
    """The products of a stage, changed in place.

    Args:
        model: with adapters attached, or with none on this stage.
    """

    def __init__(self, model: nn.Module) -> None:
        batches: dict[Any, list[Product]] = {}
        for product in products_of(model):
            # Beside slices all ranks have the same batches: two of one shape here may differ elsewhere.
            cuts = [slice_of(owner) for owner in product.owners]
            batches.setdefault((product.first.shape, product.second.shape, *cuts), []).append(product)
        self._batches = [_Batch(products=products) for products in batches.values()]
        self._group = next((group for group in map(_group_of, model.modules()) if group is not None), None)

    @property
    def names(self) -> list[str]:
        """Of the products, in the order of everything that is returned for them."""
        return [product.label for batch in self._batches for product in batch.products]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """[n] of all products, fp32, on the adapters' device. All slices of a stage call it together."""
        found = [self._norms(batch, batch.first(), batch.second()) for batch in self._batches]
        return torch.cat(found) if found else torch.empty(0)

    @torch.no_grad()
    def decay(self, weight: float, rate_of: Callable[[nn.Parameter], float]) -> None:
        """A step down the gradient of weight / 2 x |BA|²: A -= rate x weight x BᵀBA and B -= rate x weight x BAAᵀ, both
        from the A and B before it. The scale has no part in it. All slices of a stage call it together.

        Args:
            weight: of the decay.
            rate_of: the learning rate of a parameter.
        """
        for batch in self._batches:
            first, second = batch.first(), batch.second()
            inner, outer = self._grams(batch, first, second)
            changes = (inner @ first, second @ outer)
            for place, kept in enumerate(("first", "second")):
                rates = first.new_tensor([rate_of(each.owners[place]) * weight for each in batch.products])
                changed = changes[place] * rates[:, None, None]
                torch._foreach_sub_([getattr(each, kept) for each in batch.products], list(changed.unbind()))

    @torch.no_grad()
    def limit(self, most: float) -> None:
        """Scale down what is larger than `most`, A and B by the same factor. What is not finite stays so.

        All slices of a stage call it together.
        """
        for batch in self._batches:
            factors = (most / self._norms(batch, batch.first(), batch.second())).clamp(max=1.0).sqrt()
            for kept in ("first", "second"):
                torch._foreach_mul_([getattr(each, kept) for each in batch.products], list(factors.unbind()))

    def _norms(self, batch: _Batch, first: Tensor, second: Tensor) -> Tensor:
        inner, outer = self._grams(batch, first, second)
        return (inner * outer).sum(dim=(1, 2)).clamp(min=0).sqrt() * batch.scales(first)

    def _grams(self, batch: _Batch, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """BᵀB and AAᵀ, [n, rank, rank] each. Matrices are cut along the axis that is summed here, so slices add up."""
        inner, outer = second.mT @ second, first @ first.mT
        for owner, gram in zip(batch.products[0].owners, (outer, inner), strict=True):
            if self._group is not None and slice_of(owner) is not None:
                gram *= not repeats(owner)
                dist.all_reduce(gram, group=self._group.handle)
        return inner, outer


def products_of(model: nn.Module) -> Iterator[Product]:
    """Every product of a model's adapters."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        scale = module.scaling[ADAPTER]
        first: Any
        second: Any
        if ADAPTER in module.lora_A:
            first, second = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
        else:
            first, second = module.lora_embedding_A[ADAPTER], module.lora_embedding_B[ADAPTER]
        experts = getattr(module, "num_experts", 1)
        for expert in range(experts):
            yield Product(name=name, scale=scale, owners=(first, second), expert=expert, experts=experts)


def _group_of(module: nn.Module) -> TensorGroup | None:
    """The ranks that have the other slices of an adapter's matrix."""
    return module.group if isinstance(module, RowParallelLinear) else None
