"""Dropout of a model: which fields of its configuration set it, and how a run does without.

A rate is a number in a field whose name says dropout (`attention_dropout`, `resid_pdrop`, `layerdrop`,
`drop_path_rate`, ...), of the configuration or of a part of it. Those of heads that a causal language model does not
have (`classifier_dropout`, `summary_first_dropout`) are none. Some families write a rate into their code: that one is
found in the modules.

An overridden rate belongs to a run and not to the model: what is exported says what was published.
"""

import re
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError

_RATE = re.compile(
    r".*(dropout|dropout_(prob|rate|p)|pdrop|layer_?drop|drop_(path_)?(rate|prob))|(embd|attn|resid)_drop"
)
_OTHER_HEADS = re.compile(r"(classifier|classif|summary|cls|seq|qa|pooler)_.*")
PUBLISHED = "published_dropout"
"""The attribute of a model that keeps the rates which were overridden, by the names that `dropout_of` has for them."""


def dropout_of(config: PretrainedConfig) -> dict[str, float]:
    """Every rate of a configuration, 0 included, by its name, with that of a part of the model in front."""
    return {name: float(getattr(owner, field)) for name, owner, field in _fields(config)}


def check_no_chance(config: PretrainedConfig, given: str, drawn_by: str) -> None:
    """Refuse what draws random numbers, where several processes would each draw their own.

    Args:
        config: of the model.
        given: the option that does not go with it.
        drawn_by: whose numbers they are.

    Raises:
        UserError: a rate above 0, or noise of routers.
    """
    rates = [(name, rate) for name, rate in dropout_of(config).items() if rate]
    if rates:
        raise UserError(
            f"{given}: {rates[0][0]} is {rates[0][1]:g}, and {drawn_by} draw their own random numbers; give --dropout 0"
        )
    if noise := getattr(config.get_text_config(decoder=True), "router_jitter_noise", 0):
        raise UserError(
            f"{given}: router_jitter_noise is {noise:g}, and {drawn_by} draw their own random numbers; set it to 0 in"
            " config.json"
        )


def set_dropout(config: PretrainedConfig, rate: float | None) -> dict[str, float]:
    """Give every field above 0 another rate; what these were, by name. None leaves them all.

    Raises:
        UserError: a rate above 0 for a configuration without any.
    """
    if rate is None:
        return {}
    before: dict[str, float] = {}
    known = []
    for name, owner, field in _fields(config):
        known.append(name)
        if getattr(owner, field) > 0:
            before[name] = getattr(owner, field)
            setattr(owner, field, rate)
    if rate > 0 and not before:
        fields = f"; its fields are {', '.join(known)}" if known else ""
        raise UserError(
            f"--dropout {rate:g}: the configuration of model type {config.model_type!r} has no dropout above 0 that it"
            f" could replace{fields}; set the one that you mean in config.json"
        )
    return before


def restore_dropout(config: PretrainedConfig, model: PreTrainedModel) -> None:
    """Give a configuration the rates that were published with a model."""
    published: dict[str, float] = getattr(model, PUBLISHED, {})
    for name, owner, field in _fields(config):
        if name in published:
            setattr(owner, field, published[name])


def override_in_modules(model: PreTrainedModel, rate: float | None, published: dict[str, float]) -> None:
    """See to it that a model built from a configuration after `set_dropout` keeps to it.

    Args:
        model: is changed: with 0, rates that its code has are turned off too.
        rate: as in `set_dropout`.
        published: what that returned; the model keeps it for its export.
    """
    if rate is None:
        return
    setattr(model, PUBLISHED, published)
    if rate == 0:
        for module, name in _rates_of_modules(model):
            setattr(module, name, 0.0)


def dropout_left(model: nn.Module) -> list[str]:
    """The modules of a model that drop something in training, by name."""
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module, _ in _rates_of_modules(model)]


def described(config: PretrainedConfig, rate: float | None) -> str | None:
    """A line for people about the dropout that a run has; None where there is none, and none was asked about.

    Args:
        config: of the model, as it was published.
        rate: as in `set_dropout`.
    """
    rates = {name: value for name, value in dropout_of(config).items() if value > 0}
    if not rates:
        return None
    fields = ", ".join(f"{name} {value:g}" for name, value in rates.items())
    if rate is None:
        return f"dropout: {fields}, by the model's config.json; --dropout 0 trains without"
    return f"dropout: {rate:g} by --dropout, instead of {fields} in the model's config.json"


def _fields(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, PretrainedConfig, str]]:
    """Name, owner and field of each rate."""
    for field, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            yield from _fields(value, f"{prefix}{field}.")
        elif _is_rate(field, value) and not _OTHER_HEADS.fullmatch(field):
            yield prefix + field, config, field


def _is_rate(name: str, value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _RATE.fullmatch(name) is not None


def _rates_of_modules(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Modules and their attributes that are rates above 0."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            is_rate = (name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)) or _RATE.fullmatch(name)
            if is_rate and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                yield module, name
