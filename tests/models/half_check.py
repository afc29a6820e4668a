"""Whether decoder layers of a family compute the same cut between attention and mlp, and where that is.

Nothing is known of the family: every place between two of a layer's modules is tried as the cut, on what the layer is
given in the whole model, until both halves together give what the layer gives. Weights, biases and factors that a new
model has at 0 or 1 are moved away from it before, so that nothing looks right because it does nothing. The cut that is
found is then shown on stages: loss and every gradient, exports, random weights.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig

from jllm.errors import UserError
from jllm.models.families import Family, _by_type
from jllm.models.pipeline.halves import LayerHalves, LayerPart, kind_of, leave_half, parts_of
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stand_ins import AbsentPart, plain_attributes
from jllm.models.pipeline.structure import find_layers
from jllm.models.weights.loading import init_stage
from tests.models.chain import (
    chained_loss_and_gradients,
    load_chain,
    packed_batch,
    whole_loss_and_gradients,
)
from tests.models.family_check import compare_export, load_whole, make_folder, takes_packed_rows
from tests.models.moved import LIMIT, DiffersError, difference_of, move_weights
from tests.models.tiny import tiny_config

EXACT = 1e-6
"""Of what a single layer gives, relative: its halves do the same operations."""


SWITCHES: dict[str, Any] = {
    "mlp_only_layers": [1],
    "interleave_moe_layer_step": 2,
    "decoder_sparse_step": 2,
    "shared_intermediate_size": 24,
    "use_post_norm": True,
}
"""What a family's configuration may say, and then has layers of other kinds than its usual tiny model has."""


class NotHalvedError(Exception):
    """Says why layers cannot be cut inside."""


def how_halved(folder: Path, config: PretrainedConfig) -> tuple[tuple[str, ...], str]:
    """`Family.halves` and `Family.not_halved` of the model in `folder`, beside which others are written."""
    halves, why = _halved(folder, config)
    for name, value in SWITCHES.items() if halves else ():
        if hasattr(config, name):
            other = folder.with_name(name) / "whole"
            switched = tiny_config(config.model_type, **{name: value})
            make_folder(switched, other)
            halves = tuple(dict.fromkeys((*halves, *_halved(other, switched)[0])))
    return halves, why


def _halved(folder: Path, config: PretrainedConfig) -> tuple[tuple[str, ...], str]:
    moved = folder.with_name("moved")
    try:
        whole = move_weights(load_whole(folder), moved)
        halves = find_cuts(whole)
        with believed(config.model_type, halves):
            show_cuts(whole, moved, config)
    except (NotHalvedError, DiffersError) as error:
        return (), str(error)
    except UserError as error:
        return (), str(error).partition("; ")[0]
    except Exception as error:  # whatever it is, such a run would end in a traceback
        return (), f"cut inside, they fail ({type(error).__name__})"
    return halves, ""


@contextlib.contextmanager
def believed(model_type: str, halves: tuple[str, ...]) -> Iterator[None]:
    """The catalogue says so of a family, for a while."""
    known = _by_type().get(model_type) or Family(model_type=model_type, status="pass", shown="", has_plan=False)
    with mock.patch.dict(_by_type(), {model_type: replace(known, status="pass", halves=halves)}):
        yield


def find_cuts(model: PreTrainedModel) -> tuple[str, ...]:
    """The cuts of all kinds of layers that the model has.

    Raises:
        NotHalvedError: one of them has none.
    """
    layers = model.get_submodule(find_layers(model))
    assert isinstance(layers, nn.ModuleList)
    calls = calls_of(model, list(layers))
    found = [str(_cut_of(layer, *call)) for layer, call in zip(layers, calls, strict=True)]
    return tuple(dict.fromkeys(found))


def calls_of(model: PreTrainedModel, layers: list[nn.Module]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer is given in a pass of the whole model."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        # The layer may write to it.
        calls.append((_cloned(args), _cloned(kwargs)))

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(input_ids=packed_batch(model.config.get_text_config(decoder=True).vocab_size)[0], use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def _cut_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerHalves:
    if own := [name for name, _ in layer.named_parameters(recurse=False)]:
        raise NotHalvedError(f"they have parameters of their own ({own[0]})")
    parts = dict(parts_of(layer))
    layer = _with_odd_factors(layer)
    order, results = _order_of(layer, args, kwargs)
    if unused := parts.keys() - set(order):
        raise NotHalvedError(f"they do not use all that they have ({sorted(unused)[0]})")
    is_norm = {name: all(weight.ndim <= 1 for weight in each.parameters()) for name, each in parts.items()}
    if sum(not is_norm[name] for name in order) < 2:
        raise NotHalvedError("they have no two parts")
    expected = _run(layer, args, kwargs)
    for place in range(1, len(order)):
        first, second = (
            tuple(LayerPart(name, type(parts[name]).__name__, results[name]) for name in names)
            for names in (order[:place], order[place:])
        )
        halves = LayerHalves(kind=kind_of(layer), first=first, second=second)
        if all(is_norm[part.name] for part in first) or all(is_norm[part.name] for part in second):
            continue
        with contextlib.suppress(Exception):  # it is no cut, then
            between = _run(_half_of(layer, halves, is_first=True), args, kwargs)
            found = _run(_half_of(layer, halves, is_first=False), *_given(between, args, kwargs))
            if _relative(found, expected) <= EXACT and _relative(between, expected) > LIMIT:
                return halves
    one, *_, last = [name for name in order if not is_norm[name]]
    without = _with_own_modules(layer)
    setattr(without, one, AbsentPart(parts[one], results[one]))
    is_parallel = False
    with contextlib.suppress(Exception):
        is_parallel = torch.equal(*(_input_of(last, each, args, kwargs) for each in (layer, without)))
    if is_parallel:
        raise NotHalvedError(f"{one} and {last} work on the same input")
    raise NotHalvedError("no place in them separates one part's work from the next one's")


def _input_of(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a part of a layer is given first."""
    given: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.extend(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))

    handle = layer.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    with handle:
        _run(layer, args, kwargs)
    return given[0]


def _with_odd_factors(layer: nn.Module) -> nn.Module:
    """The layer, whose factors are none of those that change nothing."""
    layer = _with_own_modules(layer)
    for name, value in plain_attributes(layer).items():
        is_number = isinstance(value, float) or (type(value) is int and "factor" in name)
        if is_number and "dropout" not in name and "drop" not in name:
            setattr(layer, name, float(value) * 0.7)
    return layer


def _with_own_modules(layer: nn.Module) -> nn.Module:
    changed = copy.copy(layer)
    changed._modules = dict(layer._modules)
    return changed


def _half_of(layer: nn.Module, halves: LayerHalves, *, is_first: bool) -> nn.Module:
    half = _with_own_modules(layer)
    leave_half(half, halves, is_first=is_first)
    return half


def _order_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Parts in the order in which they are called first, and how many results each gives."""
    results: dict[str, int] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            results.setdefault(name, len(output) if isinstance(output, (tuple, list)) else 0)

        return keep

    handles = [each.register_forward_hook(note(name)) for name, each in parts_of(layer)]
    _run(layer, args, kwargs)
    for handle in handles:
        handle.remove()
    return list(results), results


@torch.no_grad()
def _run(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that comes out."""
    torch.manual_seed(0)
    output = layer(*_cloned(args), **_cloned(kwargs))
    hidden = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(hidden, Tensor)
    return hidden


def _given(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with another hidden state."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, tuple):
        return tuple(map(_cloned, value))
    return {name: _cloned(each) for name, each in value.items()} if isinstance(value, dict) else value


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def show_cuts(whole: PreTrainedModel, folder: Path, config: PretrainedConfig) -> float:
    """Loss, gradients, exports and random weights of stages that are cut inside every layer; the largest difference.

    Raises:
        DiffersError, NotHalvedError: one of them is not that of the whole model in `folder`.
    """
    vocab = config.get_text_config(decoder=True).vocab_size
    layers = whole.get_submodule(find_layers(whole))
    assert isinstance(layers, nn.ModuleList)
    end = 2 * len(layers)
    ways = (False, True) if takes_packed_rows(whole) else (False,)
    everywhere = [0, *range(1, end, 2), end]
    worst = 0.0
    for boundaries in (everywhere, [0, end - 5, end], [0, 2, 3, end]):
        stages = load_chain(folder, boundaries, in_halves=True)
        for packed in ways:
            torch.manual_seed(0)
            expected = whole_loss_and_gradients(whole, *packed_batch(vocab, packed=packed))
            torch.manual_seed(0)
            found = chained_loss_and_gradients(stages, *packed_batch(vocab, packed=packed))
            worst = max(worst, difference_of(expected, found))
        if boundaries is everywhere:
            difference = compare_export(whole, stages, folder, folder.with_name("halves"))
            if not difference.is_equal:
                raise NotHalvedError(f"an export of half layers differs: {difference.where}")
            _check_random_weights(config, boundaries)
    return worst


def _check_random_weights(config: PretrainedConfig, boundaries: list[int]) -> None:
    drawn: list[dict[str, Tensor]] = []
    for bounds in ([0, boundaries[-1]], boundaries):
        weights: dict[str, Tensor] = {}
        for span in spans_of(bounds, in_halves=True):
            weights |= init_stage(config, span, dtype=torch.float32, seed=3).state_dict()
        drawn.append(weights)
    if not all(torch.equal(tensor, drawn[0][name]) for name, tensor in drawn[1].items() if tensor.numel()):
        raise NotHalvedError("their random weights depend on the cut")
