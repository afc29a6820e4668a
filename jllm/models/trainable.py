"""Which parameters train: `--target_modules`, `--frozen_modules`, `--layers_to_transform`.

A parameter trains when a target pattern matches its module (or none is given), no frozen pattern does, and its decoder
layer is among the chosen ones (or none are chosen; parameters outside the layers do not train when some are).
Names are those of the whole model, so every stage decides alike; a tied head goes with the embedding.

Asked after everything is attached to a stage. What was attached, such as adapters, is told by its names, which the
model as it was loaded does not have (so an adapter leaves the names of what it is attached to as they are). It trains
unless a frozen pattern matches; target patterns and layers choose among the model's own parameters only.

A pattern is a regular expression that must match the whole dotted name of a module, or its last parts: `q_proj` and
`self_attn.q_proj` match `model.layers.0.self_attn.q_proj`, and so does `model.layers.[0-3]..*`. A pattern also covers
everything inside a module that it matches. Several are separated by commas.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from jllm.errors import UserError, did_you_mean
from jllm.models.pipeline.carving import published_names, structure_of
from jllm.models.pipeline.span import StageSpan


@dataclass(frozen=True, kw_only=True)
class ParameterChoice:
    """What the user chose; None: everything."""

    target_modules: str | None = None
    frozen_modules: str | None = None
    layers_to_transform: str | None = None
    attached_only: bool = False
    """The model itself is frozen; what is attached to it trains."""
    nothing: bool = False
    """All of it is frozen: the model runs forward only."""


@dataclass(frozen=True, kw_only=True)
class Selected:
    """How much of a stage trains."""

    trainable: int
    total: int
    names: tuple[str, ...]
    """Whole-model names of the parameters that train; may be empty on a stage."""


def attached_parameters(model: PreTrainedModel, span: StageSpan) -> list[str]:
    """The names of this stage's parameters that were attached after it was loaded."""
    own = set(structure_of(model).parameters)
    return [name for name in published_names(model, span).values() if name not in own]


def select_trainable(
    model: PreTrainedModel, span: StageSpan, choice: ParameterChoice, *, attached: Collection[str] | None = None
) -> Selected:
    """Set `requires_grad` on this stage's parameters. Integer parameters are left alone.

    `attached` are the names of what is attached on all stages together; None: nothing is, but on this one.

    Raises:
        UserError: on every stage alike, when a pattern matches nothing in the whole model or nothing is left to train.
    """
    structure = structure_of(model)
    if attached is None:
        attached = attached_parameters(model, span)
    chosen = set(
        choose(
            structure.parameters, choice, layers=structure.layers, num_layers=structure.num_layers, attached=attached
        )
    )
    trained: list[str] = []
    trainable = total = 0
    names = published_names(model, span)
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        if parameter.is_floating_point():
            parameter.requires_grad_(names[name] in chosen)
            if parameter.requires_grad:
                trainable += parameter.numel()
                trained.append(names[name])
    return Selected(trainable=trainable, total=total, names=tuple(trained))


def choose(
    parameters: Sequence[str],
    choice: ParameterChoice,
    *,
    layers: str,
    num_layers: int,
    attached: Collection[str] = (),
) -> list[str]:
    """The names among `parameters` (of a whole model) and those attached to it that train.

    `layers` is the dotted name of its layers.

    Raises:
        UserError: as `matching`, or nothing is left to train.
    """
    if choice.nothing:
        return []
    kept = matching(parameters, choice, layers=layers, num_layers=num_layers, attached=attached)
    if not kept:
        raise UserError(
            "--target_modules, --frozen_modules and --layers_to_transform together leave nothing to train; loosen one"
        )
    return kept


def matching(
    parameters: Sequence[str],
    choice: ParameterChoice,
    *,
    layers: str,
    num_layers: int,
    attached: Collection[str] = (),
) -> list[str]:
    """As `choose`; may be empty.

    Raises:
        UserError: a pattern that is none or matches nothing, or layers that are not there.
    """
    targets = patterns_of("--target_modules", choice.target_modules)
    frozen = patterns_of("--frozen_modules", choice.frozen_modules)
    for option, patterns, names in (
        ("--target_modules", targets, parameters),
        ("--frozen_modules", frozen, [*parameters, *attached]),
    ):
        for pattern in patterns:
            check_matches(option, pattern, names)
    allowed = None
    if choice.layers_to_transform is not None:
        allowed = {f"{layers}.{index}." for index in parse_layers(choice.layers_to_transform, num_layers)}
    own = [
        name
        for name in parameters
        if not choice.attached_only
        and (not targets or any(matches(pattern, name) for pattern in targets))
        and (allowed is None or any(name.startswith(prefix) for prefix in allowed))
    ]
    return [name for name in (*own, *attached) if not any(matches(pattern, name) for pattern in frozen)]


def matches(pattern: re.Pattern[str], parameter: str) -> bool:
    """Whether `pattern` matches the parameter, its module, or a module around it, by whole name or by last parts."""
    parts = parameter.split(".")
    return any(
        pattern.fullmatch(".".join(parts[start:end])) for end in range(1, len(parts) + 1) for start in range(end)
    )


def check_matches(option: str, pattern: re.Pattern[str], names: Collection[str]) -> None:
    """Raises:
    UserError: the pattern of `option` matches none of these parameters.
    """
    if not any(matches(pattern, name) for name in names):
        parts = {part for name in names for part in name.split(".") if not part.isdigit()}
        raise UserError(
            f"{option} {pattern.pattern!r} matches no module of the model.{did_you_mean(pattern.pattern, parts)}"
            " Give a module's name, or a regular expression for it"
        )


def parse_layers(text: str, num_layers: int, *, option: str = "--layers_to_transform") -> list[int]:
    """Layer numbers of "0:7,24:31" (both ends included) or "3", in order.

    Raises:
        UserError: not such a list, or layers that the model does not have.
    """
    chosen: set[int] = set()
    given = f"{option} {text!r}"
    for piece in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", piece)
        if found is None:
            raise UserError(f'{given}: {piece.strip()!r} is not a layer or a range; give for example "0:7,24:31"')
        first, last = int(found[1]), int(found[2] or found[1])
        if first > last or last >= num_layers:
            raise UserError(f"{given}: {piece.strip()!r} is not within the model's layers 0 to {num_layers - 1}")
        chosen.update(range(first, last + 1))
    return sorted(chosen)


def patterns_of(option: str, text: str | None) -> list[re.Pattern[str]]:
    """What an option lists, split at commas outside brackets, and compiled.

    Raises:
        UserError: no regular expression.
    """
    if text is None:
        return []
    compiled = []
    for piece in re.split(r",(?![^{\[(]*[}\])])", text):
        try:
            compiled.append(re.compile(piece.strip()))
        except re.error as error:
            raise UserError(f"{option} {piece.strip()!r} is not a regular expression ({error}); correct it") from None
    return compiled


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is one of these modules, or lies in one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def grouped(names: Collection[str]) -> str:
    """Names for people, with the numbers of layers left out: `model.layers.*.mlp.experts.down_proj`."""
    return ", ".join(sorted({re.sub(r"\.\d+(?=\.)", ".*", name) for name in names}))
