"""Random weights of a model without memory: the family's own, whatever part of the model is there.

Every module draws from a generator of its own, seeded by (seed, its name in the whole model). What the family's
`_init_weights` does not reach has the value that its constructor gives it: modules that hold such tensors are
constructed once more with memory, the others of the model without.

Costs: one pass over the weights more than the drawing; where something is not reached, the drawing twice, and those
modules for a moment twice.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def initialise(
    model: PreTrainedModel,
    construct: Callable[[], PreTrainedModel],
    *,
    seed: int,
    device: torch.device,
    skipped: tuple[type[nn.Module], ...],
) -> None:
    """Give `model`, which `construct` makes without memory, memory on `device` and values; not to modules `skipped`."""
    model.to_empty(device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for tensor in tensors.values():
            _mark(tensor)
        _draw(model, model, "", seed, skipped)
        if left := [name for name, tensor in tensors.items() if _is_marked(tensor)]:
            for name, value in _constructed(construct, left, seed=seed, device=device).items():
                tensors[name].copy_(value)
            # Again, because an initialisation may have used or changed what was not there.
            _draw(model, model, "", seed, skipped)


def _draw(
    module: nn.Module, submodel: PreTrainedModel, name: str, seed: int, skipped: tuple[type[nn.Module], ...]
) -> None:
    """Initialise `module`, children first, as transformers does."""
    for child_name, child in module.named_children():
        if not isinstance(child, skipped):
            owner = child if isinstance(child, PreTrainedModel) else submodel
            _draw(child, owner, f"{name}.{child_name}" if name else child_name, seed, skipped)
    torch.manual_seed(derived_seed(seed, name))
    if not getattr(module, "_is_hf_initialized", False):
        submodel._init_weights(module)


def derived_seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _mark(tensor: Tensor) -> None:
    """Fill new memory with what hardly any initialisation gives."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def _is_marked(tensor: Tensor) -> bool:
    """Whether `tensor` still is, at least in part, what `_mark` made of it. To say so wrongly costs time only."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.sum().isnan())  # without memory for a mask
    if tensor.dtype == torch.bool:
        return bool(tensor.all())
    return bool((tensor == torch.iinfo(tensor.dtype).max).any())


def _constructed(
    construct: Callable[[], PreTrainedModel], wanted: Collection[str], *, seed: int, device: torch.device
) -> dict[str, Tensor]:
    """The tensors `wanted` as the constructors of their modules make them, each from the seed of its module's name."""
    owners = {name.rpartition(".")[0] for name in wanted}
    order: list[nn.Module] = []
    with _constructors({type(construct().get_submodule(owner)) for owner in owners}) as calls:

        def note(module: nn.Module, init: Callable[[], None]) -> None:
            order.append(module)
            init()

        calls.append(note)
        names = {id(module): name for name, module in construct().named_modules() if name in owners}
        by_order = iter([names.get(id(module)) for module in order])
        calls.clear()

        def build(module: nn.Module, init: Callable[[], None]) -> None:
            if (name := next(by_order)) is None:
                init()
                return
            torch.manual_seed(derived_seed(seed, f"{name}()"))
            with torch.device(device):
                init()

        calls.append(build)
        model = construct()
    return {name: model.get_parameter_or_buffer(name).detach() for name in wanted}


@contextmanager
def _constructors(
    classes: Collection[type[nn.Module]],
) -> Iterator[list[Callable[[nn.Module, Callable[[], None]], None]]]:
    """Lets the function in the list that is given run the `__init__` of every new instance of `classes`."""
    calls: list[Callable[[nn.Module, Callable[[], None]], None]] = []

    def patched(of: type[nn.Module], init: Callable[..., None]) -> Callable[..., None]:
        @wraps(init)
        def run(self: nn.Module, *args: Any, **keywords: Any) -> None:
            if type(self) is of and calls:
                calls[0](self, lambda: init(self, *args, **keywords))
            else:
                init(self, *args, **keywords)

        return run

    own = {of: of.__dict__.get("__init__") for of in classes}
    for of in own:
        of.__init__ = patched(of, of.__init__)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        for of, init in own.items():
            if init is None:
                del of.__init__
            else:
                of.__init__ = init  # type: ignore[method-assign]
