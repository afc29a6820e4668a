"""Tensor parallelism of a loaded stage: which of its layers are cut how, and what cannot be.

Linear maps, experts and norms are cut as transformers' plan for the family says; embedding and head always by the
vocabulary. Attention is cut between heads. Where a family packs several maps into one parameter, each of them is cut,
which the plan does not do. Key and value heads that are fewer than ranks are shared by neighbours, each of which has a
part of their gradient.

Which families compute the same as on one process is shown by every gradient (`jllm.models.families.TENSOR_PARALLEL`),
never by a plan. Costs: one parameter is there twice at a time.
"""

import copy
import re
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.dropout import check_no_chance
from jllm.models.families import TENSOR_PARALLEL, shown_tensor_parallel
from jllm.models.pipeline.carving import structure_of
from jllm.parallel.tensor.group import SharedCopies, TensorGroup
from jllm.parallel.tensor.layers import (
    column_parallel,
    even,
    row_parallel,
    sliced_experts,
    vocabulary_parallel_embedding,
    vocabulary_parallel_head,
)
from jllm.parallel.tensor.slices import Ranges, chunk, chunks_of_packed, cut, slice_of

OPTION = "--model_parallel_size"
FUSED_ATTENTION, FUSED_GATES = "qkv_proj", "gate_up_proj"
"""Linear maps that hold several behind one another: queries, keys and values; gate and what it multiplies."""
_COLUMNS = ("colwise", "colwise_gather_output")
_ROWS = ("rowwise", "rowwise_split_input")
_HEAD_COUNTS = ("num_heads", "num_attention_heads")
_SHARED_COUNTS = ("num_key_value_heads", "num_kv_heads")


def check_tensor_parallel(config: PretrainedConfig, family: type[PreTrainedModel], size: int) -> None:
    """Raises:
    UserError: the model cannot be cut into so many slices, or was not shown to compute the same then.
    """
    if size == 1:
        return
    given = f"{OPTION} {size}"
    if not shown_tensor_parallel(family):
        raise UserError(
            f"{given}: model type {config.model_type!r} was not shown to train the same in slices, as"
            f" {', '.join(TENSOR_PARALLEL)} were; use --pipe_parallel_size"
        )
    text = config.get_text_config(decoder=True)
    queries, keys = text.num_attention_heads, shared_heads(config)
    if queries % size:
        raise UserError(f"{given} does not divide the {queries} attention heads; give a divisor of {queries}")
    if keys % size and size % keys:
        raise UserError(
            f"{given}: neither it nor the {keys} key and value heads divide the other; give a divisor or a multiple of"
            f" {keys}"
        )
    is_fused = any(name.endswith(FUSED_ATTENTION) for name in getattr(text, "base_model_tp_plan", None) or {})
    if is_fused and size > keys:
        raise UserError(
            f"{given}: the {keys} key and value heads of model type {config.model_type!r} lie in one parameter with the"
            f" queries and are not shared; give at most {keys}"
        )
    for name in ("vocab_size", "intermediate_size"):
        length = getattr(text, name)
        if chunk(length, size, size - 1)[0] >= length:
            raise UserError(f"{given}: {name} {length} leaves nothing for the last process; give less")
    check_no_chance(config, given, "slices")


def shared_heads(config: PretrainedConfig) -> int:
    """How many key and value heads a model has."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def sharers(config: PretrainedConfig, size: int) -> int:
    """How many of `size` ranks share one key/value head."""
    return max(1, size // shared_heads(config))


def slice_stage(model: PreTrainedModel, group: TensorGroup) -> None:
    """Leave a stage this rank's slices, and have its layers compute with them.

    Args:
        model: loaded and sealed, of a family that `check_tensor_parallel` lets pass.
        group: the ranks that share it.
    """
    ends = (model.get_submodule(structure_of(model).embedding), model.get_output_embeddings())
    _Slicing(model, group).run(ends)
    mark_repeats(model, group)


def mark_repeats(model: nn.Module, group: TensorGroup) -> None:
    """Say of every parameter whether another rank of the group acts for it."""
    for parameter in model.parameters():
        is_whole, is_shared = slice_of(parameter) is None, hasattr(parameter, _SHARED)
        repeats = not group.leads if is_whole else is_shared and not group.leads_sharers
        parameter.jllm_repeats = repeats  # type: ignore[attr-defined]


def repeats(parameter: nn.Parameter) -> bool:
    """Whether another rank of the tensor group has the same elements, and acts for all that have."""
    return getattr(parameter, "jllm_repeats", False)


def partial_gradient(parameter: nn.Parameter) -> Any:
    """The process group over which the gradients of a parameter have to be summed; None for most."""
    return getattr(parameter, _SHARED, getattr(parameter, _PARTIAL, None))


def mark_shared(parameter: nn.Parameter, sharing: Any) -> None:
    """Say that the ranks of a process group have the same slice of a parameter, and each a part of its gradient."""
    setattr(parameter, _SHARED, sharing)


_SHARED, _PARTIAL = "jllm_shared_over", "jllm_partial_over"


class _Slicing:
    """The walk over one stage."""

    def __init__(self, model: PreTrainedModel, group: TensorGroup) -> None:
        self._model, self._group = model, group
        text = model.config.get_text_config(decoder=True)
        self._queries, self._keys = text.num_attention_heads, shared_heads(model.config)
        self._plan = [
            (re.compile(re.escape(name).replace(r"\*", r"\d+")), style) for name, style in model.tp_plan.items()
        ]
        self._copies: dict[str, SharedCopies] = {}

    def run(self, ends: tuple[nn.Module, nn.Module | None]) -> None:
        """Cut everything; `ends` are the embedding and the head, or what stands in for them."""
        embedding, head = ends
        tied = isinstance(head, nn.Linear) and getattr(embedding, "weight", None) is head.weight
        if isinstance(embedding, nn.Embedding):
            vocabulary_parallel_embedding(embedding, self._group)
        if isinstance(head, nn.Linear):
            weight = embedding.get_parameter("weight") if tied else None
            vocabulary_parallel_head(head, self._group, weight=weight)
        for name, module in list(self._model.named_modules()):
            style = self._style(name)
            if style is not None and not any(module is end for end in ends):
                self._cut_module(name, module, style)
        for name, _ in list(self._model.named_parameters()):
            style = self._style(name)
            if style is not None:
                self._cut_parameter(name, style)

    def _style(self, name: str) -> str | None:
        return next((style for pattern, style in self._plan if pattern.fullmatch(name)), None)

    def _cut_module(self, name: str, module: nn.Module, style: str) -> None:
        parent_name, _, leaf = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        is_attention = hasattr(parent, "head_dim")
        if isinstance(module, nn.Linear) and style in _COLUMNS:
            copies = self._copies.setdefault(parent_name, SharedCopies(self._group))
            column_parallel(
                module, self._outputs(parent, leaf, module) if is_attention else self._even(module, leaf), copies
            )
            if is_attention and leaf in ("k_proj", "v_proj") and self._group.sharers > 1:
                for parameter in module.parameters():
                    mark_shared(parameter, self._group.sharing)
            if is_attention:
                self._count_heads(parent, is_fused=leaf == FUSED_ATTENTION)
        elif isinstance(module, nn.Linear) and style in _ROWS:
            ranges = (self._of_heads(parent.head_dim),) if is_attention else even(module.in_features, self._group)
            row_parallel(module, ranges, self._group)
        elif style == "replicated_with_grad_allreduce":
            for parameter in module.parameters():
                setattr(parameter, _PARTIAL, self._group.handle)
        elif style == "moe_tp_experts":
            sliced_experts(module, self._group)
        else:
            raise AssertionError(f"{name}: {style} of a {type(module).__name__}, in a family that was shown to work")

    def _cut_parameter(self, name: str, style: str) -> None:
        """Of packed experts, [experts, out, in]."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)
        shape = parent.get_parameter(leaf).shape
        assert len(shape) == 3, name
        if style == "packed_colwise":
            half = shape[1] // 2
            cut(parent, leaf, 1, chunks_of_packed((half, half), self._group.size, self._group.rank))
        else:
            assert style in _ROWS, (name, style)
            cut(parent, leaf, 2, even(shape[2], self._group))

    def _even(self, module: nn.Linear, leaf: str) -> Ranges:
        if leaf == FUSED_GATES:
            half = module.out_features // 2
            return chunks_of_packed((half, half), self._group.size, self._group.rank)
        return even(module.out_features, self._group)

    def _outputs(self, parent: nn.Module, leaf: str, module: nn.Linear) -> Ranges:
        """The outputs of a map of attention that are of this rank's heads."""
        width = parent.head_dim
        assert isinstance(width, int)
        queries, keys = self._of_heads(width), self._of_shared_heads(width)
        if leaf == FUSED_ATTENTION:
            ranges: Ranges = (queries,)
            for place in (self._queries, self._queries + self._keys):
                ranges += ((place * width + keys[0], place * width + keys[1]),)
            assert module.out_features == (self._queries + 2 * self._keys) * width
            return ranges
        count = {"q_proj": self._queries, "k_proj": self._keys, "v_proj": self._keys}[leaf]
        assert module.out_features == count * width, leaf
        return (queries if leaf == "q_proj" else keys,)

    def _of_heads(self, width: Any) -> tuple[int, int]:
        first, end = chunk(self._queries, self._group.size, self._group.rank)
        return first * width, end * width

    def _of_shared_heads(self, width: int) -> tuple[int, int]:
        first, end = self._group.shared_range(self._keys)
        return first * width, end * width

    def _count_heads(self, attention: Any, *, is_fused: bool) -> None:
        """Tell an attention module how many heads it has."""
        queries = self._queries // self._group.size
        keys = self._keys * self._group.sharers // self._group.size
        counts = {**dict.fromkeys(_HEAD_COUNTS, queries), **dict.fromkeys(_SHARED_COUNTS, keys)}
        counts["num_key_value_groups"] = queries // keys
        for name, count in counts.items():
            if name in vars(attention):
                setattr(attention, name, count)
        if is_fused:  # where the queries end, it asks the configuration
            attention.config = copy.copy(attention.config)
            attention.config.num_attention_heads = queries
            attention.config.num_key_value_heads = keys
