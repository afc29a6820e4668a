"""A transformers model cut down to what one stage owns, with the whole model's names.

A stage keeps the family's own `ForCausalLM` class. Decoder layers of other stages are replaced by stand-ins that hand
the hidden state on, so layer indices, attention masks, rotary tables and sliding windows stay the family's own, and
parameter names stay global: `model.layers.7.mlp.up_proj.weight` has that name whatever the number of stages. So it has
where a layer is cut inside: then stand-ins are in the place of the half that is elsewhere.

Guarantees: what a stage owns depends on its span alone; the first and the last stage of a tied model share one name,
and no others do. Costs nothing: it works on models without memory (meta device).
"""

import re
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.families import check_split
from jllm.models.pipeline.halves import find_halves, leave_half
from jllm.models.pipeline.span import StageSpan
from jllm.models.pipeline.stand_ins import AbsentEmbedding, AbsentLayer, AbsentModule, Passage
from jllm.models.pipeline.structure import Structure, find_structure, whole_structure

_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What adapters put between a module and its parameters."""
_PARAMETRISED = re.compile(r"\.parametrizations\.(\w+)\.original$")
"""What becomes of the name of a parameter of packed experts that is quantised."""


def stage_class(family: type[PreTrainedModel], span: StageSpan) -> type[PreTrainedModel]:
    """The family's own class, whose instances keep only what `span` owns.

    Deriving at run time lets `from_pretrained` build the whole model without memory (meta device), lose the parts of
    other stages, and then read only the tensors that still have a place.
    """

    def init(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        carve(self, span)

    namespace = {
        "__init__": init,
        "__module__": family.__module__,
        "__qualname__": family.__qualname__,
        "__doc__": family.__doc__,
    }
    return type(family.__name__, (family,), namespace)


def carve(model: PreTrainedModel, span: StageSpan) -> None:
    """Replace in place what `span` does not own. A tied head and its embedding stay together until `seal`.

    Raises:
        UserError: the model cannot be cut this way, and why.
    """
    check_split(model.config, span)
    structure = find_structure(model) if span.count > 1 else whole_structure(model)
    model.__dict__["_jllm_structure"] = structure
    model.__dict__["_jllm_entrance"] = model.__dict__["_jllm_exit"] = None
    if span.count == 1:
        return
    # transformers ties whichever of the two is stored to the other, and sees where both are and differ.
    pairs = structure.tied if span.is_first or span.is_last else ()
    together = [name for pair in pairs for name in pair]
    layers = model.get_submodule(structure.layers)
    assert isinstance(layers, nn.ModuleList)
    assert 0 <= span.first_layer < span.end_layer <= structure.num_layers
    for index, layer in enumerate(layers):
        if not span.first_layer <= index < span.end_layer:
            layers[index] = AbsentLayer(layer, structure.returned)
    for index, is_first in ((span.first_layer, False), (span.end_layer - 1, True)):
        if span.ends_inside if is_first else span.starts_inside:
            leave_half(layers[index], find_halves(layers[index], type(model)), is_first=is_first)
    _open_passages(model, layers, span)
    for name in (*(() if span.is_first else structure.before), *(() if span.is_last else structure.after)):
        if not any(one.startswith(name + ".") for one in together):
            _replace(model, name)
    if not span.is_last:
        # What a family initialises from the top is the head, which is elsewhere.
        model._is_hf_initialized = True
    if not together:
        model.all_tied_weights_keys = {}


def _open_passages(model: PreTrainedModel, layers: nn.ModuleList, span: StageSpan) -> None:
    """Say where hidden states enter, but on the first stage, and where they leave, but on the last one."""
    if not span.is_first:
        entrance: nn.Module | Passage = layers[0]
        if not isinstance(entrance, AbsentLayer):
            assert span.starts_inside
            entrance = Passage.into(layers[0])
        model.__dict__["_jllm_entrance"] = entrance
    if not span.is_last:
        last = layers[min(span.end_layer, len(layers) - 1)]
        if isinstance(last, AbsentLayer):
            last.is_exit = True
            model.__dict__["_jllm_exit"] = last
        else:
            assert span.ends_inside
            model.__dict__["_jllm_exit"] = Passage.out_of(last)


def seal(model: PreTrainedModel, span: StageSpan) -> None:
    """After the weights are in: of a tied pair the first stage keeps the embedding and the last one the head."""
    if span.is_first == span.is_last:
        return
    structure = structure_of(model)
    for name in structure.after if span.is_first else structure.before:
        if any(True for _ in model.get_submodule(name).parameters()):
            _replace(model, name)
    # Not a tie inside this process any more: the other one is on another stage.
    model.all_tied_weights_keys = {}


def structure_of(model: PreTrainedModel) -> Structure:
    """The parts of a model that went through `carve`, as they were in the whole model."""
    structure = model._jllm_structure
    assert isinstance(structure, Structure)
    return structure


def entrance_of(model: PreTrainedModel) -> AbsentLayer | Passage:
    """Where what a later stage received is put, as `received`."""
    entrance = model._jllm_entrance
    assert isinstance(entrance, AbsentLayer | Passage)
    return entrance


def exit_of(model: PreTrainedModel) -> AbsentLayer | Passage:
    """Where an earlier stage finds what is to be sent, as `sent`."""
    leave = model._jllm_exit
    assert isinstance(leave, AbsentLayer | Passage)
    return leave


def published_names(model: PreTrainedModel, span: StageSpan) -> dict[str, str]:
    """Name of each parameter in this stage's model → its name in the whole model.

    The two differ for a tied head on a stage that does not own the embedding: there the head's own name maps to the
    embedding's, because in the whole model they are one tensor. So two stages share that name, and nothing else. They
    differ, too, where adapters are attached (`plain_name`).
    """
    copies = dict(structure_of(model).tied) if span.is_last else {}
    plain = {name: plain_name(name) for name, _ in model.named_parameters()}
    return {name: copies.get(own, own) for name, own in plain.items()}


def plain_name(name: str) -> str:
    """The name of a parameter among attached adapters, or quantised: as without, and for adapters as peft stores it."""
    if any(part.startswith("lora_") for part in name.split(".")):
        return re.sub(r"(\.lora_magnitude_vector)\.weight$", r"\1", name.replace(".default", ""))
    name = _PARAMETRISED.sub(r".\1", name)
    return _WRAPPERS.sub("", name).replace(".modules_to_save.default.", ".modules_to_save.")


def tied_parameter(model: PreTrainedModel, span: StageSpan) -> tuple[str, nn.Parameter] | None:
    """The parameter that must be kept equal on the first and the last stage, with its name in the whole model.

    The embedding on the first stage, the head's copy on the last one; None on other stages, for an untied model, and
    with one stage. The sum of both gradients is the whole model's gradient.
    """
    ties = structure_of(model).tied
    if not ties or span.count == 1 or not (span.is_first or span.is_last):
        return None
    assert len(ties) == 1, ties
    copy, original = ties[0]
    return original, model.get_parameter(original if span.is_first else copy)


def _replace(model: PreTrainedModel, name: str) -> None:
    """Put the fitting stand-in where module `name` is."""
    parent_name, _, child_name = name.rpartition(".")
    replaced = model.get_submodule(name)
    embedding = next((module for module in replaced.modules() if isinstance(module, nn.Embedding)), None)
    stand_in = AbsentModule(replaced) if embedding is None else AbsentEmbedding(embedding)
    setattr(model.get_submodule(parent_name), child_name, stand_in)
