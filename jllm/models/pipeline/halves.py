"""Decoder layers cut between attention and mlp, without code for any family.

A stage that has a half of a layer keeps the family's own layer. The other half's norms hand on what they are given,
and its attention or mlp gives zeros, so what is added to the stream there is nothing. Each parameter of the layer is
in one of the halves, and so on one stage.

Which modules are in which half, and for which kinds of layers that computes the same, is in the catalogue: the walk
over all families searches and shows it (`Family.halves` in `jllm.models.families`). A layer with other modules, with
modules of other classes or with other switches is not taken for one of these.

Cost: a tensor of zeros and an addition for each half that is absent.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from jllm.errors import UserError
from jllm.models.families import shown_halves
from jllm.models.pipeline.stand_ins import AbsentModule, AbsentPart, plain_attributes

OPTION = "--split_dlayer"


class LayerPart(NamedTuple):
    """A module of a decoder layer that has parameters."""

    name: str
    kind: str
    """Its class."""
    results: int = 0
    """How many results it gives in a tuple; 0 for one that is no tuple."""

    def __str__(self) -> str:
        return f"{self.name}={self.kind}" + f"/{self.results}" * bool(self.results)

    @classmethod
    def parse(cls, text: str) -> "LayerPart":
        name, _, rest = text.partition("=")
        kind, _, results = rest.partition("/")
        return cls(name, kind, int(results or 0))


@dataclass(frozen=True, kw_only=True)
class LayerHalves:
    """The halves of decoder layers of one kind.

    Attributes:
        kind: class and switches of the layer.
        first: what runs up to the addition of the attention's output.
        second: the rest.
    """

    kind: str
    first: tuple[LayerPart, ...]
    second: tuple[LayerPart, ...]

    def __str__(self) -> str:
        first, second = (" ".join(map(str, half)) for half in (self.first, self.second))
        return f"{self.kind}: {first} | {second}"

    @classmethod
    def parse(cls, text: str) -> "LayerHalves":
        """The inverse of `str`."""
        kind, _, parts = text.partition(": ")
        first, second = (tuple(map(LayerPart.parse, half.split())) for half in parts.split(" | "))
        return cls(kind=kind, first=first, second=second)

    def fits(self, layer: nn.Module) -> bool:
        """Whether `layer` is one of these."""
        known = {(part.name, part.kind) for part in (*self.first, *self.second)}
        return kind_of(layer) == self.kind and {(name, type(each).__name__) for name, each in parts_of(layer)} == known


def kind_of(layer: nn.Module) -> str:
    """The class of a layer, and what it says of itself that is true or false."""
    said = sorted(plain_attributes(layer).items())
    switches = [f"{name}={value}" for name, value in said if isinstance(value, bool) and not name.startswith("_")]
    return " ".join([type(layer).__name__, *switches])


def parts_of(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer that have parameters, by name."""
    return ((name, each) for name, each in layer.named_children() if any(True for _ in each.parameters()))


def find_halves(layer: nn.Module, family: type[PreTrainedModel]) -> LayerHalves:
    """The halves of a whole layer of transformers' own class `family`.

    Raises:
        UserError: layers of this family, or this kind, were not shown to compute the same in halves.
    """
    model_type = getattr(family.config_class, "model_type", family.__name__)
    shown, why = shown_halves(family)
    if not shown:
        raise UserError(f"{OPTION}: layers of model type {model_type!r} cannot be cut inside: {why}; drop it")
    for text in shown:
        halves = LayerHalves.parse(text)
        if halves.fits(layer):
            return halves
    parts = ", ".join(f"{name} {type(each).__name__}" for name, each in parts_of(layer))
    raise UserError(
        f"{OPTION}: a layer of this model of type {model_type!r} is none of those that were shown to compute the same"
        f" in halves: {kind_of(layer)} ({parts}); drop it"
    )


def leave_half(layer: nn.Module, halves: LayerHalves, *, is_first: bool) -> None:
    """Leave a whole layer its first half, or its second one; of the other one come stand-ins."""
    for part in halves.second if is_first else halves.first:
        replaced = layer.get_submodule(part.name)
        is_norm = all(each.ndim <= 1 for each in replaced.parameters())
        setattr(layer, part.name, AbsentModule(replaced) if is_norm else AbsentPart(replaced, part.results))


def as_modules(layer: nn.Module, halves: LayerHalves) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """What is in the two halves of a whole layer, by its names."""
    first, second = (
        {part.name: layer.get_submodule(part.name) for part in half} for half in (halves.first, halves.second)
    )
    return nn.ModuleDict(first), nn.ModuleDict(second)
