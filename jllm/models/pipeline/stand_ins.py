"""Stand-ins for what other stages own: a layer, a half of one, an embedding, a norm or head.

They keep the family's own forward running: what it walks and calls is there, in the right shape, and does nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Answering(nn.Module):
    """Answers for the plain attributes of the module it replaces (`attention_type`, ...), which some families read."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        for name, value in plain_attributes(replaced).items():
            setattr(self, name, value)
        self.__dict__["_replaced"] = type(replaced)

    def __getattr__(self, name: str) -> Any:
        """The class attributes of the replaced module; its methods (to set a mode, ...) do nothing here."""
        value = getattr(self.__dict__.get("_replaced"), name, None)
        if value is None or isinstance(value, property):
            return super().__getattr__(name)
        return _do_nothing if callable(value) else value


class AbsentLayer(_Answering):
    """Stands in for a decoder layer of another stage: hands the hidden state on.

    On a later stage layer 0 is the entrance: it returns what was received. On all stages but the last one, the stand-in
    after the stage's own layers is the exit: it keeps what is to be sent.
    """

    def __init__(self, replaced: nn.Module, returned: int) -> None:
        super().__init__(replaced)
        self.returned = returned
        self.is_exit = False
        self.received: Tensor | None = None
        self.sent: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The received hidden state on an entrance, else the first argument."""
        hidden = self.received if self.received is not None else args[0] if args else kwargs["hidden_states"]
        if self.is_exit:
            self.sent = hidden
        return (hidden, *[None] * (self.returned - 1)) if self.returned else hidden


class AbsentPart(_Answering):
    """Stands in for the attention or the mlp of a layer whose other half is here: adds nothing to the stream.

    Args:
        replaced: what the other stage has.
        results: how many results the layer unpacks; 0 where it takes the one that there is.
    """

    def __init__(self, replaced: nn.Module, results: int) -> None:
        super().__init__(replaced)
        self.results = results

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros in the shape of its input, and None for further results."""
        hidden = kwargs.get("hidden_states")
        if hidden is None:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        # Memory of their own: some families add to what they are given.
        zeros = torch.zeros_like(hidden)
        return (zeros, *[None] * (self.results - 1)) if self.results else zeros


class Passage:
    """Where hidden states enter or leave at a layer of which a stage has a half, and no stand-in does it.

    That is layer 0 of a later stage, and the last layer of an earlier one.
    """

    def __init__(self) -> None:
        self.received: Tensor | None = None
        self.sent: Tensor | None = None

    @classmethod
    def into(cls, layer: nn.Module) -> "Passage":
        """A layer that works on what was received."""
        passage = cls()

        def take(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
            if args:
                return (passage.received, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": passage.received}

        layer.register_forward_pre_hook(take, with_kwargs=True)
        return passage

    @classmethod
    def out_of(cls, layer: nn.Module) -> "Passage":
        """A layer whose result is to be sent."""
        passage = cls()

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            passage.sent = output[0] if isinstance(output, (tuple, list)) else output

        layer.register_forward_hook(keep)
        return passage


class AbsentEmbedding(nn.Module):
    """Stands in for an embedding (of tokens or positions) of the first stage: adds nothing."""

    weight: Tensor

    def __init__(self, replaced: nn.Embedding) -> None:
        super().__init__()
        self.width = replaced.embedding_dim
        # Without elements: some families look at it for the device.
        empty = torch.empty(0, dtype=replaced.weight.dtype, device=replaced.weight.device)
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in the shape of an embedding of the first tensor argument."""
        ids = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return torch.zeros(*ids.shape, self.width, dtype=self.weight.dtype, device=ids.device)


class AbsentModule(nn.Module):
    """Stands in for a norm, a projection or a head of another stage: hands its input on, in the right shape."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.width: int | None = None
        if isinstance(replaced, nn.Linear) and replaced.in_features != replaced.out_features:
            self.width = replaced.out_features

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Its input, or zeros of the width that the replaced projection would give."""
        return hidden if self.width is None else hidden.new_zeros(1).expand(*hidden.shape[:-1], self.width)


def plain_attributes(module: nn.Module) -> dict[str, bool | int | float | str]:
    """What a module says of itself beside tensors and other modules."""
    common = set(nn.Module().__dict__)
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in common and isinstance(value, (int, float, str, bool))
    }


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """A method of a layer that is elsewhere."""
