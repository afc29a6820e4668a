"""`--sequence_sharded_norms`: between attention and mlp each slice of a stage has some of the tokens.

Norms and sums of decoder layers then work on, and keep for the backward pass, a part of each hidden state; without it
every slice has all of them. Stages still take and give whole hidden states. No code for any family: what a layer has
inside is seen by its parameters, and which families compute the same is shown by every gradient
(`Family.sharded_norms`).

Modules of norms and factors work on a rank's own tokens. All others are given all tokens and give up those of other
ranks; where nothing but sliced maps is inside, their sums go to each rank's tokens at once, and no more is sent than
without.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.stand_ins import AbsentLayer
from jllm.models.tensor_parallel.marks import mark_partial, partial_gradient
from jllm.parallel.tensor.group import TensorGroup
from jllm.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, scatter_sums, take_as_given
from jllm.parallel.tensor.tokens import all_tokens, own_tokens

Forward = Callable[..., Any]


@dataclasses.dataclass
class _Rows:
    """What the modules of a layer need to know of the micro-batch that passes."""

    length: int = 0


def shard_norms(model: PreTrainedModel, group: TensorGroup) -> None:
    """Have the layers of a sliced stage do so. Call before anything wraps their forward.

    Args:
        model: that `slice_stage` has cut.
        group: the ranks that share it.
    """
    layers = model.get_submodule(structure_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    own = [layer for layer in layers if not isinstance(layer, AbsentLayer)]
    rows = _Rows()
    for layer in own:
        layer.forward = _sharded(layer.forward, rows, group, is_first=layer is own[0], is_last=layer is own[-1])
        for parameter in layer.parameters(recurse=False):
            mark_partial(parameter, group.handle)
        for child in layer.children():
            parameters = list(child.parameters())
            if all(each.ndim <= 1 for each in parameters):
                for parameter in parameters:
                    mark_partial(parameter, group.handle)
            else:
                _give_all_tokens(child, rows, group)


def _sharded(forward: Forward, rows: _Rows, group: TensorGroup, *, is_first: bool, is_last: bool) -> Forward:
    """A layer's forward between whole hidden states at the ends of the stage and a rank's own tokens inside."""

    def sharded(*args: Any, **kwargs: Any) -> Any:
        # Said at each call: a layer may run again, for the backward pass of another micro-batch.
        rows.length = kwargs["position_ids"].shape[-1]
        if is_first:
            args, kwargs = _with_hidden(args, kwargs, lambda hidden: own_tokens(hidden, group))
        output = forward(*args, **kwargs)
        if is_last:
            return _with_first(output, lambda hidden: all_tokens(hidden, rows.length, group, is_partial=False))
        return output

    return sharded


def _give_all_tokens(module: nn.Module, rows: _Rows, group: TensorGroup) -> None:
    is_pure = _is_pure(module)
    for each in module.modules() if is_pure else ():
        if isinstance(each, ColumnParallelLinear):
            take_as_given(each)
        elif isinstance(each, RowParallelLinear):
            scatter_sums(each)
            if each.bias is not None:
                mark_partial(each.bias, group.handle)

    def gather(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return _with_hidden(args, kwargs, lambda part: all_tokens(part, rows.length, group, is_partial=is_pure))

    def cut(_: nn.Module, args: Any, output: Any) -> Any:
        return _with_first(output, lambda hidden: own_tokens(hidden, group))

    module.register_forward_pre_hook(gather, with_kwargs=True)
    if not is_pure:
        module.register_forward_hook(cut)


def _is_pure(module: nn.Module) -> bool:
    """Whether all that has parameters is a sliced map, or has the gradient of the slices' heads."""
    return all(
        isinstance(each, (ColumnParallelLinear, RowParallelLinear))
        or all(partial_gradient(parameter) is not None for parameter in each.parameters(recurse=False))
        for each in module.modules()
    )


def _with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return (change(output[0]), *output[1:]) if isinstance(output, (tuple, list)) else change(output)
