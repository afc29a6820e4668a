"""Tensor parallelism of a loaded stage: its layers are cut as a plan says, its embedding and head by the vocabulary.

Attention is cut between heads. Where a family packs several maps into one parameter, each of them is cut. Key and value
heads that are fewer than ranks are shared by neighbours, each of which has a part of their gradient.

Which families compute the same as on one process, and which of their parts are cut, is shown by every gradient
(`Family.slices`), never by a plan. What is quantised was cut while it was loaded; its modules learn of it here.
Costs: one parameter is there twice at a time.
"""

import copy
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from jllm.models.families import BY_PLAN, IN_LAYERS, shown_slices
from jllm.models.pipeline.carving import plain_name, structure_of
from jllm.models.pipeline.stand_ins import AbsentModule, AbsentPart
from jllm.models.tensor_parallel import plans
from jllm.models.tensor_parallel.checks import shared_heads
from jllm.models.tensor_parallel.marks import mark_partial, mark_repeats, mark_shared
from jllm.models.tensor_parallel.plans import SlicingPlan
from jllm.models.tensor_parallel.sharded_norms import shard_norms
from jllm.parallel.tensor.group import SharedCopies, TensorGroup
from jllm.parallel.tensor.layers import (
    add_once,
    column_parallel,
    copied_from,
    even,
    row_parallel,
    sliced_experts,
    vocabulary_parallel_embedding,
    vocabulary_parallel_head,
)
from jllm.parallel.tensor.slices import Ranges, chunk, chunks_of_packed, cut

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "all_head_size")
"""What an attention module may say of all its heads: how many they are, and how wide together."""
_SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads")
_SHARED_MAPS = ("k_proj", "v_proj")
_ALIGNED = 16


def slice_stage(
    model: PreTrainedModel, group: TensorGroup, *, how: str | None = None, sharded_norms: bool = False
) -> None:
    """Leave a stage this rank's slices, and have its layers compute with them.

    Args:
        model: loaded and sealed, of a family that `check_tensor_parallel` lets pass.
        group: the ranks that share it.
        how: what of it is cut, as `Family.slices` says; None for what was shown of its family.
        sharded_norms: whether they share the tokens between attention and mlp, too.
    """
    # A later stage may lack what the embedding lies in.
    embedding = dict(model.named_modules()).get(structure_of(model).embedding)
    _slice_vocabulary((embedding, model.get_output_embeddings()), group)
    how = how or shown_slices(type(model)).how
    if how in (IN_LAYERS, BY_PLAN):
        _Slicing(model, group, SlicingPlan(model, with_usual=how == IN_LAYERS)).run()
    if sharded_norms:
        shard_norms(model, group)
    mark_repeats(model, group)


def _slice_vocabulary(ends: tuple[nn.Module | None, nn.Module | None], group: TensorGroup) -> None:
    """Cut embedding and head, where they are here."""
    embedding, head = ends
    tied = isinstance(head, nn.Linear) and getattr(embedding, "weight", None) is head.weight
    if isinstance(embedding, nn.Embedding):
        vocabulary_parallel_embedding(embedding, group)
    if isinstance(head, nn.Linear):
        weight = embedding.get_parameter("weight") if tied and embedding is not None else None
        vocabulary_parallel_head(head, group, weight=weight)


def _take_any_width(experts: Any) -> None:
    """Have experts whose slices are no multiple of 16 bytes wide multiply one by one: grouped products cannot."""
    packed = [each for each in experts.parameters(recurse=False) if each.ndim == 3]
    widths = [each.stride(1) * each.itemsize for each in packed]
    for quantised in getattr(experts, "parametrizations", {}).values():
        state = quantised[0].quant_state
        widths.append(state.shape[-1] * state.dtype.itemsize)
    if "config" in vars(experts) and any(width % _ALIGNED for width in widths):
        experts.config = copy.copy(experts.config)
        experts.config._experts_implementation_internal = "eager"


class _Slicing:
    """The walk over the layers of one stage."""

    def __init__(self, model: PreTrainedModel, group: TensorGroup, plan: SlicingPlan) -> None:
        self._model, self._group, self._plan = model, group, plan
        self._copies: dict[str, SharedCopies] = {}
        self._counted: set[str] = set()

    def run(self) -> None:
        """Cut everything that the plan has a style for."""
        for name, module in list(self._model.named_modules()):
            # What a half of a layer lacks has the name of what it stands in for.
            if (style := self._plan.style(name)) is not None and not isinstance(module, (AbsentModule, AbsentPart)):
                self._cut_module(name, module, style)
        for name in [plain_name(name) for name, _ in self._model.named_parameters()]:
            if (style := self._plan.style(name)) is not None:
                self._cut_parameter(name, style)

    def _cut_module(self, name: str, module: nn.Module, style: str) -> None:
        parent_name, _, leaf = name.rpartition(".")
        parent: Any = self._model.get_submodule(parent_name)
        if style == plans.PARTIAL:
            for parameter in module.parameters():
                mark_partial(parameter, self._group.handle)
        elif style == plans.EXPERTS:
            sliced_experts(module, self._group)
        elif style == plans.LATENT:
            copied_from(module, parent.kv_lora_rank, self._group)
        elif isinstance(module, nn.Linear) and style in (plans.COLUMNS, plans.PACKED_COLUMNS, plans.PACKED_QKV):
            column_parallel(
                module,
                self._outputs(parent, leaf, module, style),
                self._copies.setdefault(parent_name, SharedCopies(self._group)),
            )
            if leaf in _SHARED_MAPS and self._group.sharers > 1:
                for parameter in module.parameters():
                    mark_shared(parameter, self._group.sharing)
            if parent_name not in self._counted:
                self._counted.add(parent_name)
                self._count_heads(parent, is_packed=style == plans.PACKED_QKV)
        elif isinstance(module, nn.Linear) and style == plans.ROWS:
            row_parallel(module, even(module.in_features, self._group), self._group)
        else:
            assert style == plans.LOCAL, f"{name}: {style} of a {type(module).__name__}"

    def _cut_parameter(self, name: str, style: str) -> None:
        """Of packed experts, [experts, out, in] or [experts, in, out], their biases, and what a module has a head."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        if is_parametrized(parent, leaf):  # in few bits, and cut while it was loaded
            _take_any_width(parent)
            return
        shape, group = parent.get_parameter(leaf).shape, self._group
        columns = max(len(shape) - 2, 0)
        if style == plans.ADDED_ONCE:
            mark_partial(parent.get_parameter(leaf), group.handle)
            add_once(parent, leaf, group)
        elif style in (plans.PACKED_COLUMNS, plans.PACKED_ROWS):
            axis = columns if style == plans.PACKED_COLUMNS else len(shape) - 1
            half = shape[axis] // 2
            cut(parent, leaf, axis, chunks_of_packed((half, half), group.size, group.rank))
        elif style == plans.PAIRED_ROWS:
            first, end = chunk(shape[-1] // 2, group.size, group.rank)
            cut(parent, leaf, len(shape) - 1, ((2 * first, 2 * end),))
        else:
            assert style in (plans.COLUMNS, plans.ROWS), f"{name}: {style}"
            axis = columns if style == plans.COLUMNS else len(shape) - 1
            cut(parent, leaf, axis, even(shape[axis], group))
        _take_any_width(parent)

    def _outputs(self, parent: nn.Module, leaf: str, module: nn.Linear, style: str) -> Ranges:
        """The outputs of a map that are this rank's."""
        size, rank = self._group.size, self._group.rank
        if style == plans.PACKED_COLUMNS:
            half = module.out_features // 2
            return chunks_of_packed((half, half), size, rank)
        if style == plans.PACKED_QKV:
            text = self._model.config.get_text_config(decoder=True)
            width, queries, keys = parent.head_dim, text.num_attention_heads, shared_heads(self._model.config)
            assert isinstance(width, int)
            assert module.out_features == (queries + 2 * keys) * width
            return chunks_of_packed((queries * width, keys * width, keys * width), size, rank)
        if leaf in _SHARED_MAPS and self._group.sharers > 1:
            width = parent.head_dim
            assert isinstance(width, int)
            first, end = self._group.shared_range(module.out_features // width)
            return ((first * width, end * width),)
        return even(module.out_features, self._group)

    def _count_heads(self, attention: Any, *, is_packed: bool) -> None:
        """Tell an attention module how many heads it has."""
        size, sharers = self._group.size, self._group.sharers
        has = vars(attention)
        for names, factor in ((_HEAD_COUNTS, 1), (_SHARED_COUNTS, sharers)):
            for name in names:
                if isinstance(count := has.get(name), int):
                    setattr(attention, name, count * factor // size)
        if isinstance(groups := has.get("num_key_value_groups"), int):
            attention.num_key_value_groups = groups // sharers
        if is_packed:  # where the queries end, it asks the configuration
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads //= size
            attention.config.num_key_value_heads //= size
