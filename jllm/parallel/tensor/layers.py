"""Layers that compute with their slice of the weights.

A layer keeps its place, its name and its parameters' names: it is given a class derived from its own. What goes into
column-parallel layers and comes out of row-parallel ones is alike on all ranks.

Guarantees: outputs and gradients of the whole layer, up to the order of sums. Weights of another type than the input's,
as adapters may have, multiply in the input's. Weights in few bits multiply as their own class does it.
Cost: an all-reduce a row-parallel layer and an embedding in the forward pass, one an input of column-parallel layers in
the backward pass.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from jllm.parallel.tensor.group import SharedCopies, TensorGroup, copied, summed
from jllm.parallel.tensor.slices import Ranges, Slice, chunk, cut, mark_slice, slice_of
from jllm.parallel.tensor.tokens import scattered
from jllm.parallel.tensor.vocabulary import VocabularyShard


class ColumnParallelLinear(nn.Linear):
    """A linear map with some of its outputs; what follows works on them."""

    copies: SharedCopies | None

    def forward(self, input: Tensor) -> Tensor:
        """This rank's outputs."""
        return linear(self._copy(input), self.weight.to(input.dtype), self.bias)

    def _copy(self, input: Tensor) -> Tensor:
        return input if self.copies is None else self.copies(input)


class RowParallelLinear(nn.Linear):
    """A linear map with some of its inputs; all of its outputs, on every rank."""

    group: TensorGroup
    scatters = False

    def forward(self, input: Tensor) -> Tensor:
        """All outputs; with `scatters` those of this rank's tokens. The bias is added once, after the sum."""
        total = self._total(linear(input, self.weight.to(input.dtype)))
        return total if self.bias is None else total + self.bias

    def _total(self, part: Tensor) -> Tensor:
        return scattered(part, self.group) if self.scatters else summed(part, self.group)


class FewBitsColumns(ColumnParallelLinear):
    """A column-parallel map that multiplies as the class after this one does, which knows its weights in few bits."""

    def forward(self, input: Tensor) -> Tensor:
        """This rank's outputs."""
        found: Tensor = super(ColumnParallelLinear, self).forward(self._copy(input))
        return found


class FewBitsRows(RowParallelLinear):
    """The same of a row-parallel map. Each rank's product has its part of the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """All outputs."""
        return self._total(super(RowParallelLinear, self).forward(input))


class VocabularyParallelLinear(ColumnParallelLinear):
    """A head with the logits of some of the vocabulary."""

    shard: VocabularyShard


class VocabularyParallelEmbedding(nn.Embedding):
    """An embedding with some of the rows. What a family's own embedding does to them is linear."""

    shard: VocabularyShard

    def forward(self, input: Tensor) -> Tensor:
        """All tokens' embeddings: a rank gives zeros for those whose rows it has not."""
        inside = (input >= self.shard.start) & (input < self.shard.stop)
        rows = super().forward(torch.where(inside, input - self.shard.start, 0))
        return summed(rows.masked_fill(~inside[..., None], 0), self.shard.group)


def column_parallel(layer: nn.Linear, ranges: Ranges, copies: SharedCopies) -> None:
    """Leave a linear map the outputs in `ranges`; `copies` is shared by all that take the same input."""
    _cut_outputs(layer, ranges)
    _become(layer, ColumnParallelLinear, FewBitsColumns)
    copies.takers += 1
    layer.copies = copies  # type: ignore[assignment]


def row_parallel(layer: nn.Linear, ranges: Ranges, group: TensorGroup) -> None:
    """Leave a linear map the inputs in `ranges`."""
    cut(layer, "weight", 1, ranges)
    layer.in_features = _local_shape(layer)[1]
    _become(layer, RowParallelLinear, FewBitsRows)
    layer.group = group  # type: ignore[assignment]
    if isinstance(layer, FewBitsRows) and layer.bias is not None:
        add_once(layer, "bias", group)


def take_as_given(layer: ColumnParallelLinear) -> None:
    """Have a map not copy its input: whoever gives it adds the gradients of the ranks."""
    layer.copies = None


def scatter_sums(layer: RowParallelLinear) -> None:
    """Have a map give each rank its tokens' sums alone."""
    layer.scatters = True


def take_columns(layer: nn.Linear, ranges: Ranges, outputs: int, copies: SharedCopies) -> None:
    """Have a map without a bias, that was made with as many outputs as lie in `ranges` of `outputs`, be that slice."""
    assert layer.bias is None
    assert isinstance(layer.weight, nn.Parameter)
    mark_slice(layer.weight, Slice(shape=(outputs, layer.in_features), axis=0, ranges=ranges))
    layer.__class__ = ColumnParallelLinear
    copies.takers += 1
    layer.copies = copies  # type: ignore[assignment]


def take_rows(layer: nn.Linear, ranges: Ranges, inputs: int, group: TensorGroup) -> None:
    """The same of a map with as many inputs."""
    assert isinstance(layer.weight, nn.Parameter)
    mark_slice(layer.weight, Slice(shape=(layer.out_features, inputs), axis=1, ranges=ranges))
    layer.__class__ = RowParallelLinear
    layer.group = group  # type: ignore[assignment]


def vocabulary_parallel_head(layer: nn.Linear, group: TensorGroup, *, weight: nn.Parameter | None = None) -> None:
    """Leave a head the logits of this rank's part of the vocabulary; `weight` is one that is cut, where it is tied."""
    shard = VocabularyShard.of(layer.out_features, group)
    _cut_outputs(layer, ((shard.start, shard.stop),), weight=weight)
    layer.__class__ = VocabularyParallelLinear
    layer.copies, layer.shard = SharedCopies(group), shard  # type: ignore[assignment]
    layer.copies.takers = 1  # type: ignore[union-attr]


def vocabulary_parallel_embedding(layer: nn.Embedding, group: TensorGroup) -> None:
    """Leave an embedding this rank's rows."""
    shard = VocabularyShard.of(layer.num_embeddings, group)
    cut(layer, "weight", 0, ((shard.start, shard.stop),))
    if layer.padding_idx is not None:
        layer.padding_idx = layer.padding_idx - shard.start if shard.has(layer.padding_idx) else None
    layer.num_embeddings = shard.stop - shard.start
    own = type(layer)
    # What the family's own class does around the rows stays: a scale, for one.
    layer.__class__ = type(own.__name__, (VocabularyParallelEmbedding, own), {})
    layer.shard = shard  # type: ignore[assignment]


def sliced_experts(module: nn.Module, group: TensorGroup) -> None:
    """Have experts, whose parameters are cut, take what all ranks have alike and give it too.

    The weights of the choice are inputs as well: each rank's slice gives a part of their gradient.
    """

    def copy_in(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def of(value: Any) -> Any:
            return copied(value, group) if isinstance(value, Tensor) and value.is_floating_point() else value

        return tuple(map(of, args)), {name: of(value) for name, value in kwargs.items()}

    def sum_out(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return summed(output, group)

    module.register_forward_pre_hook(copy_in, with_kwargs=True)
    module.register_forward_hook(sum_out)


def copied_from(module: nn.Module, first: int, group: TensorGroup) -> None:
    """Of what a whole map gives, have the entries from `first` on go into sliced layers as they are.

    Latent attention is of this kind: the ones before `first` pass through maps that copy them, the others, its rotary
    keys, go straight to every rank's heads (DeepSeek-AI, 2024, arXiv:2405.04434, section 2.1).
    """

    def copy_rest(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.cat((output[..., :first], copied(output[..., first:], group)), -1)

    handle = module.register_forward_hook(copy_rest)
    module.jllm_copies = (handle, first, group)  # type: ignore[assignment]


def move_copies(module: nn.Module, to: nn.Module) -> None:
    """Have what `copied_from` does with the results of a map done with those of another module, that has it within."""
    if (known := vars(module).pop("jllm_copies", None)) is not None:
        handle, first, group = known
        handle.remove()
        copied_from(to, first, group)


def add_once(module: nn.Module, name: str, group: TensorGroup) -> None:
    """Have a module that adds a whole parameter on every rank add its part of it, so that their sum has it once.

    The gradients of the ranks are parts, too.
    """
    own: Any = type(module)
    module.__class__ = _adding_a_part(own, name, group.size)


def shard_of(module: nn.Module | None) -> VocabularyShard | None:
    """Which part of the vocabulary a head gives the logits of; None where it gives all."""
    return getattr(module, "shard", None)


def _cut_outputs(layer: nn.Linear, ranges: Ranges, *, weight: nn.Parameter | None = None) -> None:
    if weight is None:
        cut(layer, "weight", 0, ranges)
    else:
        layer.weight = weight
    if layer.bias is not None:
        cut(layer, "bias", 0, ranges)
    layer.out_features = _local_shape(layer)[0]


def _local_shape(layer: nn.Linear) -> tuple[int, ...]:
    held = slice_of(layer.weight)
    assert held is not None
    return held.local_shape


def _become(layer: nn.Linear, plain: type[nn.Linear], few_bits: type[nn.Linear]) -> None:
    """Give a map one of two classes; in few bits its own class stays behind that."""
    classes: tuple[Any, Any] = few_bits, type(layer)
    layer.__class__ = plain if layer.weight.is_floating_point() else _derived(*classes)


@functools.cache  # what compiles equal layers once needs them to be of one class
def _derived(first: Any, own: Any) -> Any:
    return type(own.__name__, (first, own), {})


@functools.cache
def _adding_a_part(own: Any, name: str, size: int) -> Any:
    def part_of(self: nn.Module) -> Tensor:
        whole = self._parameters[name]
        assert whole is not None
        return whole / size

    return type(own.__name__, (own,), {name: property(part_of)})


def even(length: int, group: TensorGroup) -> Ranges:
    """This rank's part of so many."""
    return (chunk(length, group.size, group.rank),)
