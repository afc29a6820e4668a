"""Where a transformers causal model keeps its embedding, its decoder layers and its head, and who owns what.

Nothing here knows a family by name. The base model is the one behind `base_model_prefix`; its decoder layers are the
`ModuleList` whose length is the configuration's number of layers. What is registered before that list (embedding,
learned positions, an embedding norm) is used before the first layer, what is registered after it (final norm) after
the last one: transformers' families are written in that order, and `USED_AFTER_LAYERS` names the few exceptions.
A model that does not have this shape is refused with a `UserError` that says what is unusual about it.

Costs nothing: it works on models without memory (meta device) and only looks at names and shapes.
"""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError

# Registered before the layers in some family (OPT, MPT, ...), though applied after the last one.
USED_AFTER_LAYERS = frozenset(
    {"norm", "norm_f", "ln_f", "final_norm", "final_layer_norm", "final_layernorm", "project_out"}
)

INDEXED = 3
"""Entries of the tuple that a stand-in returns where the loop indexes it: families look at most at the third one."""


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Dotted names of the parts of a causal model, relative to the model itself."""

    layers: str
    """The `ModuleList` of decoder layers."""
    num_layers: int
    before: tuple[str, ...]
    """Modules with parameters that run before the first decoder layer; the first stage owns them."""
    after: tuple[str, ...]
    """Modules with parameters that run after the last decoder layer, the head included; the last stage owns them."""
    embedding: str
    """The token embedding, one of `before`."""
    tied: tuple[tuple[str, str], ...]
    """Pairs (copy, original) of parameter names that are one tensor in the whole model: the head and the embedding."""
    returned: int
    """What a decoder layer returns: 0 for the hidden state itself, n for a tuple of n with the hidden state first, or
    `INDEXED` where the family's loop takes entries of a tuple by number."""
    parameters: tuple[str, ...]
    """Every parameter of the whole model; a tied head is not among them."""
    stored: frozenset[str]
    """Every tensor that has a place in files of the whole model; both names of a tied pair."""
    routers: tuple[str, ...]
    """Routers of mixture-of-experts layers, those of other stages included."""
    needs_ids: bool
    """Whether decoder layers take the input ids (hash routing): then these travel with the labels."""


def count_layers(config: PretrainedConfig) -> int:
    """The number of decoder layers that a configuration declares.

    Raises:
        UserError: it declares none.
    """
    text = config.get_text_config(decoder=True)
    # Where the two differ (LongCat: two attentions per layer), num_layers counts what the model lists.
    count = vars(text).get("num_layers") or getattr(text, "num_hidden_layers", None)
    if not isinstance(count, int) or count < 1:
        raise UserError(
            f"model type {config.model_type!r} does not say how many decoder layers it has (num_hidden_layers); "
            "a pipeline needs a model with a list of decoder layers"
        )
    return count


def find_layers(model: PreTrainedModel) -> str:
    """The dotted name of the list of decoder layers.

    Raises:
        UserError: there is none, or more than one.
    """
    count = count_layers(model.config)
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and any(True for _ in module.parameters())
    ]
    outermost: list[str] = [
        name for name in found if not any(name.startswith(other + ".") for other in found if other != name)
    ]
    if len(outermost) == 1:
        return outermost[0]
    by_name = [name for name in outermost if name.rsplit(".", 1)[-1] in {"layers", "h", "blocks"}]
    if len(by_name) == 1:
        return by_name[0]
    raise UserError(
        f"model type {model.config.model_type!r} has {len(outermost)} lists of {count} layers"
        f"{' (' + ', '.join(outermost) + ')' if outermost else ''}; a pipeline needs exactly one list of decoder layers"
    )


def find_structure(model: PreTrainedModel) -> Structure:
    """The parts of `model`, or a `UserError` where it does not have the shape that a pipeline needs."""
    layers = find_layers(model)
    before: list[str] = []
    after: list[str] = []
    # Walk down from the model to the list of layers: at each level the siblings are used before or after it.
    path = layers.split(".")
    for depth in range(len(path)):
        prefix = ".".join(path[:depth])
        parent = model.get_submodule(prefix)
        if loose := [name for name, _ in parent.named_parameters(recurse=False)]:
            raise UserError(
                f"model type {model.config.model_type!r} has parameters outside its modules ({', '.join(loose)}); "
                "a pipeline cannot tell which stage owns them"
            )
        passed = False
        for name, child in parent.named_children():
            if name == path[depth]:
                passed = True
            elif any(True for _ in child.parameters()):
                # What lies beside the base model is a head, also where it is registered first.
                late = depth == 0 or name in USED_AFTER_LAYERS or (passed and not name.startswith("embed_"))
                (after if late else before).append(f"{prefix}.{name}" if prefix else name)
    embedding = _name_of(model, model.get_input_embeddings())
    if embedding is None or not any(embedding == name or embedding.startswith(name + ".") for name in before):
        raise UserError(
            f"model type {model.config.model_type!r} has no token embedding before its decoder layers; "
            "a pipeline cannot feed it"
        )
    return Structure(
        layers=layers,
        num_layers=count_layers(model.config),
        before=tuple(before),
        after=tuple(after),
        embedding=embedding,
        tied=tuple(sorted(model.all_tied_weights_keys.items())),
        returned=_returned_by_layers(model.get_submodule(layers.rpartition(".")[0]), path[-1]),
        parameters=_whole_names(model),
        stored=frozenset(model.state_dict()),
        routers=tuple(find_routers(model)),
        needs_ids="input_ids" in inspect.signature(type(model.get_submodule(layers + ".0")).forward).parameters,
    )


def whole_structure(model: PreTrainedModel) -> Structure:
    """The structure for a single stage, which nothing is taken from: a model of any shape will do."""
    try:
        return find_structure(model)
    except UserError:
        return Structure(
            layers="",
            num_layers=0,
            before=(),
            after=(),
            embedding="",
            tied=tuple(sorted(model.all_tied_weights_keys.items())),
            returned=0,
            parameters=_whole_names(model),
            stored=frozenset(model.state_dict()),
            routers=tuple(find_routers(model)),
            needs_ids=False,
        )


def find_routers(model: PreTrainedModel) -> dict[str, int]:
    """Name of each router → which of its outputs are the logits, as the family declares it to transformers.

    Empty for families without routers, and for those that do not declare them.
    """
    # Some families declare it at the whole model, some at the decoder inside.
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel))
    declarations = ((getattr(part, "_can_record_outputs", None) or {}).get("router_logits") for part in parts)
    declared: Any = next(filter(None, declarations), None)
    recorders = declared if isinstance(declared, (list, tuple)) else [declared] if declared else []
    found: dict[str, int] = {}
    for recorder in recorders:
        wanted = recorder if isinstance(recorder, type) else recorder.target_class
        within = None if isinstance(recorder, type) else recorder.layer_name
        for name, module in model.named_modules():
            if wanted is not None and isinstance(module, wanted) and (within is None or within in name):
                found[name] = 0 if isinstance(recorder, type) else recorder.index
    # JetMoe declares the router of its attention and the attention around it, which hands the same logits on.
    return {name: index for name, index in found.items() if not any(other.startswith(name + ".") for other in found)}


def _returned_by_layers(container: nn.Module, name: str) -> int:
    """How the family's own loop over its layers unpacks what they return, read from its source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(container).forward)))
    except (OSError, TypeError):
        return 0
    for loop in ast.walk(ast.parse(source)):
        if isinstance(loop, ast.For) and f"self.{name}" in ast.unparse(loop.iter):
            loop_names = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
            for node in ast.walk(loop):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    called = {inner.id for inner in ast.walk(node.value.func) if isinstance(inner, ast.Name)}
                    if called & loop_names:
                        return _unpacked(node.targets[0], loop)
    return 0


def _unpacked(target: ast.expr, loop: ast.For) -> int:
    """What the loop does with the result that it assigns to `target`, in terms of `Structure.returned`."""
    if isinstance(target, ast.Tuple):
        return len(target.elts)
    subscripted = {
        node.value.id for node in ast.walk(loop) if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)
    }
    return INDEXED if isinstance(target, ast.Name) and target.id in subscripted else 0


def _whole_names(model: PreTrainedModel) -> tuple[str, ...]:
    copies = model.all_tied_weights_keys
    return tuple(copies.get(name, name) for name, _ in model.named_parameters())


def _name_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is wanted), None)
