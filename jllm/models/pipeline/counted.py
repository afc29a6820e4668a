"""A model without memory, of which costs are counted: what it has, and what is attached to it.

Costs: building it on the meta device, some milliseconds per layer; as much again where something is attached. Whoever
makes many estimates of one model keeps it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.families import VOCABULARY, shown_slices
from jllm.models.pipeline.carving import plain_name
from jllm.models.pipeline.halves import LayerHalves, find_halves
from jllm.models.pipeline.structure import Structure, find_structure, whole_structure
from jllm.models.weights.source import bare_model, causal_class


@dataclass(frozen=True, kw_only=True, eq=False)
class CountedModel:
    """A model without memory.

    Attributes:
        model: with what is attached to it.
        structure: of the model alone.
        layers: the decoder layers, or the model itself where it has no list of them.
        halves: of each layer; none where stages are not cut inside them.
        own: of each layer the parameters that it has alone, by their names in it.
        ends: the parameters of embedding and head alone.
    """

    model: PreTrainedModel
    structure: Structure
    layers: tuple[nn.Module, ...]
    halves: tuple[LayerHalves, ...]
    own: tuple[tuple[tuple[str, nn.Parameter], ...], ...]
    ends: tuple[nn.Parameter, ...]

    @classmethod
    def of(
        cls,
        config: PretrainedConfig,
        family: type[PreTrainedModel] | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        attach: Callable[[PreTrainedModel], object] | None = None,
        is_whole: bool = False,
        in_halves: bool = False,
    ) -> "CountedModel":
        """Build it.

        Args:
            config: of the model.
            family: its class; None for the one that transformers has for `config`.
            dtype: of its weights.
            attach: gives it what is trained beside it.
            is_whole: for one stage, where a model of any shape will do; one without a list of layers then counts as a
                single layer.
            in_halves: stages may be cut inside layers.

        Raises:
            UserError: the model has no list of layers that could be split, or these cannot be cut inside.
        """
        model = bare_model(config, family or causal_class(config), dtype=dtype)
        structure = whole_structure(model) if is_whole else find_structure(model)
        listed = model.get_submodule(structure.layers)
        layers = tuple(listed) if isinstance(listed, nn.ModuleList) else (listed,)
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        found = cls(
            model=model,
            structure=structure,
            layers=layers,
            halves=tuple(find_halves(layer, type(model)) for layer in layers) if in_halves else (),
            own=tuple(tuple(layer.named_parameters()) for layer in layers),
            ends=tuple(each for end in ends if end is not None for each in end.parameters()),
        )
        if attach is not None:
            attach(model)
        return found

    @functools.cached_property
    def parameters(self) -> tuple[tuple[str, nn.Parameter], ...]:
        """Everything that there is, by its name without adapters and bits around it (`plain_name`)."""
        return tuple((plain_name(name), each) for name, each in self.model.named_parameters())

    def cut_parameters(self) -> frozenset[int]:
        """The identities of the parameters of which each of several processes has a slice.

        Raises:
            UserError: layers have parameters that models of the family which were shown in slices have not.
        """
        shown = shown_slices(type(self.model))
        found = {id(each) for each in self.ends}
        for own in self.own if self.structure.layers and shown.how != VOCABULARY else ():
            found |= {id(each) for name, each in own if shown.axis(name) is not None}
        return frozenset(found)
