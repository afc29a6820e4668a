"""Which model families work in a pipeline, how that was shown, and why the others are refused.

`check_split` is asked before a stage is built. Most refusals are not about a family but about a configuration: the
same family without the feature, or cut elsewhere, or on one stage, works. What has no list of decoder layers at all is
refused by `jllm.models.pipeline.structure`.

The catalogue is written by `tools/test_families.py`, which trains every causal model type of the installed
transformers, tiny and random, whole and in stages, and compares. Nothing in it is claimed without that run.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllm.errors import UserError
from jllm.guards import notation
from jllm.models.pipeline.span import StageSpan

if TYPE_CHECKING:  # `jllm models` only reads a file, and should not wait for transformers
    from transformers import PretrainedConfig, PreTrainedModel

CATALOGUE = Path(__file__).with_name("families.json")

# Tested one by one in every run of the tests, at two and three stages.
NAMED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "cohere",
    "cohere2",
    "olmo2",
    "granite",
    "glm4",
    "smollm3",
    "starcoder2",
    "deepseek_v3",
    "gpt_oss",
)

IN_LAYERS, BY_PLAN, VOCABULARY, NOT_SLICED = "layers", "plan", "vocabulary", "no"
"""What of a family is cut in slices (tensor parallelism): layers as most families' are and as transformers' plan says,
by that plan alone, embedding and head alone, nothing."""

# Families whose layers do more than hand a hidden state from one to the next, whatever the configuration.
REFUSED = {
    "inkling2_text": "its layers read the states of all blocks before them, not only the last one",
    "falcon_h1": "its initialisation reaches into every layer from the top",
    "blt": "it runs three models over bytes and patches, not one list of layers over tokens",
    "gemma4_assistant": "it drafts for another model and reads that model's states",
    "gemma4_unified_assistant": "it drafts for another model and reads that model's states",
    "reformer": "its reversible layers carry two streams and recompute one from the other",
    "roformer": "its table of positions is used by every layer and belongs to none",
    "xlnet": "it predicts permuted tokens with two streams of attention, not the next token",
    "xlm": "its layers are four lists side by side, not one list",
    "xmod": "its layers hold one adapter per language and need the language of every row",
    "zamba": "its attention layers share one set of weights across depth",
    "zamba2": "its attention layers share sets of weights across depth",
    "hrm_text": "it runs its two lists of layers over and over, so no layer runs only once per token",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """One line of the catalogue."""

    model_type: str
    status: str
    """`pass`, `refused` or `failed`."""
    shown: str
    """What was compared, or the reason."""
    has_plan: bool
    """Whether transformers declares a pipeline plan for it."""
    isolates_documents: bool = False
    """Whether documents packed in a row do not see each other where position ids restart (`--block_mask`)."""
    by_lengths: str = "none"
    """Which kernels that build no mask are right: `varlen` (and flash-attn), `flash` (that only) or `none`."""
    head_apart: bool = False
    """Whether the head alone, on any part of the hidden states, gives the family's own logits."""
    plain_head: bool = False
    """Whether that head is a product with the output embedding, and a loss fused with it has the same gradients."""

    compiled: str = "no"
    """Whether compiled decoder layers have the loss and every gradient of the layers as they are: `inductor`, compiled
    as in a run; `traced`, by the graphs that inductor is given; or `no`."""
    halves: tuple[str, ...] = ()
    """The kinds of decoder layers that compute the same cut between attention and mlp, and how they are cut
    (`jllm.models.pipeline.halves.LayerHalves`); nothing where it was not shown of one of them."""
    not_halved: str = ""
    """Why there are none, as far as the walk knows."""
    slices: str = NOT_SLICED
    """What of it is cut for tensor parallelism, and then has the loss and every gradient of the whole model."""
    sliced: tuple[str, ...] = ()
    """Parameters of its decoder layers, by their names there, each with the axis along which it is cut, if it is."""
    shares_heads: bool = False
    """Whether that was shown for more slices than key and value heads."""
    sharded_norms: bool = False
    """Whether that was shown with the tokens between attention and mlp shared by the slices, too."""
    not_sliced: str = ""
    """Why not more of it is cut, as far as the walk knows."""
    shared_rows: str = "no"
    """Whether processes that share the tokens of rows have its loss and every gradient: `yes` or `no`."""

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Family":
        """The line that `dataclasses.asdict` made `entry` of, by way of JSON."""
        return cls(**{**entry, **{name: tuple(entry.get(name, ())) for name in ("halves", "sliced")}})

    @property
    def apart(self) -> str:
        """`isolates_documents` for people; empty where it was not asked."""
        return "" if self.status != "pass" else "yes" if self.isolates_documents else "no"

    @property
    def kernels(self) -> str:
        """`by_lengths` for people."""
        return "" if self.status != "pass" else self.by_lengths

    @property
    def head(self) -> str:
        """`head_apart` and `plain_head` for people."""
        how = "plain" if self.plain_head else "apart" if self.head_apart else "whole"
        return how if self.status == "pass" else ""

    @property
    def layers(self) -> str:
        """`compiled` for people."""
        return "" if self.status != "pass" else self.compiled

    @property
    def in_slices(self) -> str:
        """`slices` for people."""
        return "" if self.status != "pass" else self.slices

    @property
    def in_norms(self) -> str:
        """`sharded_norms` for people; empty where no layers are cut."""
        return "" if self.in_slices not in (IN_LAYERS, BY_PLAN) else "yes" if self.sharded_norms else "no"

    @property
    def in_rows(self) -> str:
        """`shared_rows` for people."""
        return "" if self.status != "pass" else self.shared_rows

    @property
    def half_layers(self) -> str:
        """`halves` for people."""
        return "" if self.status != "pass" else "yes" if self.halves else "no"


def catalogue() -> tuple[str, list[Family]]:
    """The version of transformers that was walked, and every causal model type with its result."""
    stored = notation.read_json(CATALOGUE)
    return stored["transformers"], [Family.of(entry) for entry in stored["families"]]


def catalogue_table() -> str:
    """The catalogue as text for `jllm models`: one line per family."""
    version, families = catalogue()
    width = max(len(family.model_type) for family in families)
    counts = {status: sum(family.status == status for family in families) for status in ("pass", "refused", "failed")}
    rows = [("type", "result", "apart", "lengths", "halves", "slices", "rows", "shown by, or reason")]
    rows += [
        (
            *(family.model_type, family.status, family.apart, family.kernels),
            *(family.half_layers, family.in_slices, family.in_rows, family.shown),
        )
        for family in families
    ]
    lines = [
        f"{name:<{width}}  {status:<7}  {apart:<5}  {kernels:<7}  {halves:<6}  {slices:<10}  {shared:<4}  {shown}"
        for name, status, apart, kernels, halves, slices, shared, shown in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            "apart: --block_mask keeps documents of a row apart",
            "lengths: kernels that are right without a mask; varlen stands for flash-attn too",
            "halves: --split_dlayer cuts inside layers",
            "slices: what --model_parallel_size cuts: layers, layers by transformers' plan, or the vocabulary alone",
            "rows: --sequence_parallel_size has processes share the tokens of rows",
            f"transformers {version}: {counts['pass']} pass, {counts['refused']} refused, {counts['failed']} failed",
        ]
    )


def shown_by_lengths(family: type["PreTrainedModel"]) -> str | None:
    """`Family.by_lengths` of transformers' own class `family`; None where the walk did not run it."""
    known = _shown(family)
    return known.by_lengths if known is not None else None


def has_head_apart(family: type["PreTrainedModel"]) -> bool:
    """Whether the walk has shown the head of transformers' own class `family` to work apart from the rest."""
    known = _shown(family)
    return known is not None and known.head_apart


def has_plain_head(family: type["PreTrainedModel"]) -> bool:
    """Whether the walk has shown that a loss can be fused with the head of transformers' own class `family`."""
    known = _shown(family)
    return known is not None and known.plain_head


def shown_compiled(family: type["PreTrainedModel"]) -> bool:
    """Whether the walk has shown compiled decoder layers of transformers' own class `family` to be right."""
    known = _shown(family)
    return known is not None and known.compiled != "no"


@dataclass(frozen=True, kw_only=True)
class ShownSlices:
    """What was shown of a family in slices.

    Attributes:
        model_type: of the family.
        how: `Family.slices`.
        why: not more of it is cut.
        shares_heads, sharded_norms: as in `Family`.
        axes: the axis along which a parameter of a decoder layer is cut, None for one that is whole, by its name there.
    """

    model_type: str
    how: str
    why: str
    shares_heads: bool
    sharded_norms: bool
    axes: Mapping[str, int | None]

    def axis(self, name: str) -> int | None:
        """How a parameter of a decoder layer is cut, by its name there; None for a whole one.

        Raises:
            UserError: no model with such a parameter was shown to train the same.
        """
        if self.how == VOCABULARY:
            return None
        name = _NUMBERS.sub("*", name)
        if name in self.axes:
            return self.axes[name]
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and weight in self.axes:  # whichever way a map is cut, its bias follows
            return 0 if self.axes[weight] == 0 else None
        raise UserError(
            f"--model_parallel_size: models of type {self.model_type!r} with {name} in their layers were not shown to"
            " train the same in slices; use --pipe_parallel_size"
        )


_NUMBERS = re.compile(r"(?<![^.])\d+(?![^.])")


def layer_parameter(name: str, cut_along: int | None) -> str:
    """An entry of `Family.sliced`."""
    name = _NUMBERS.sub("*", name)
    return name if cut_along is None else f"{name} {cut_along}"


def shown_slices(family: type["PreTrainedModel"]) -> ShownSlices:
    """What was shown of transformers' own class `family` in slices."""
    known = _shown(family)
    if known is None:
        model_type = getattr(family.config_class, "model_type", family.__name__)
        return ShownSlices(
            model_type=model_type, how=NOT_SLICED, why="not walked", shares_heads=False, sharded_norms=False, axes={}
        )
    entries = [entry.partition(" ") for entry in known.sliced]
    return ShownSlices(
        model_type=known.model_type,
        how=known.slices,
        why=known.not_sliced,
        shares_heads=known.shares_heads,
        sharded_norms=known.sharded_norms,
        axes={name: int(axis) if axis else None for name, _, axis in entries},
    )


def shown_halves(family: type["PreTrainedModel"]) -> tuple[tuple[str, ...], str]:
    """`Family.halves` of transformers' own class `family`, and why there are none."""
    known = _shown(family)
    return (known.halves if known else ()), (known and known.not_halved) or "that was not shown to compute the same"


def _shown(family: type["PreTrainedModel"]) -> Family | None:
    """The line of transformers' own class `family`; None where the walk did not pass it.

    Code that comes with a model may call itself like a family that is in the catalogue.
    """
    if not family.__module__.startswith("transformers.") or family.config_class is None:
        return None
    known = _known(family.config_class.model_type)
    return known if known is not None and known.status == "pass" else None


def _known(model_type: str) -> Family | None:
    return _by_type().get(model_type)


@functools.cache
def _by_type() -> dict[str, Family]:
    return {family.model_type: family for family in catalogue()[1]}


def check_block_mask(config: "PretrainedConfig") -> None:
    """Raise a `UserError` where documents packed in a row would see each other in spite of `--block_mask`.

    By the catalogue: a family that is not in it is taken at its word.
    """
    known = _known(config.model_type)
    if known is not None and known.status == "pass" and not known.isolates_documents:
        raise UserError(
            f"--block_mask: model type {config.model_type!r} carries state from one document of a row to the next, or "
            "ignores positions in its masks; leave the option out, or prepare rows of one document each"
        )


def possible_starts(config: "PretrainedConfig") -> frozenset[int] | None:
    """The layers that a stage other than the first can start with; None where every layer will do.

    Layers that reuse the token selection of the layer before them must be on its stage.
    """
    kinds = getattr(config.get_text_config(decoder=True), "indexer_types", None)
    return frozenset(index for index, kind in enumerate(kinds) if kind != "shared" and index) if kinds else None


def check_split(config: "PretrainedConfig", span: StageSpan) -> None:
    """Raise a `UserError` where this model cannot be cut the way `span` says. One stage is never refused."""
    if span.count == 1:
        return
    text = config.get_text_config(decoder=True)
    what = f"model type {config.model_type!r} cannot be split into {span.count} pipeline stages"
    remedy = "use --pipe_parallel_size 1"
    if reason := REFUSED.get(config.model_type):
        raise UserError(f"{what}: {reason}; {remedy}")
    if config.is_encoder_decoder:
        raise UserError(f"{what}: it is an encoder-decoder, not a decoder; give a decoder (`jllm models` lists them)")
    if text is not config:
        parts = ", ".join(sorted(set(config.sub_configs)))
        raise UserError(f"{what}: it is a decoder among other parts ({parts}); give its text-only model")
    if getattr(text, "hidden_size_per_layer_input", 0):
        raise UserError(f"{what}: every layer reads its own embedding of the input ids; {remedy}")
    if getattr(text, "num_kv_shared_layers", 0):
        raise UserError(f"{what}: its last layers reuse keys and values of earlier layers; {remedy}")
    starts = possible_starts(config)
    # Of a layer that is cut, the stage before has the selection.
    first = span.first_layer + span.starts_inside
    if starts is not None and first and first < span.end_layer and first not in starts:
        allowed = ", ".join(map(str, sorted(starts)))
        raise UserError(
            f"stage {span.index} of model type {config.model_type!r} cannot start with layer {first}, which "
            f"reuses the token selection of the layer before it; "
            + (f"begin stages with layers among {allowed}, or give --partition_method fast" if allowed else remedy)
        )
