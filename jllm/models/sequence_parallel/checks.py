"""Which models train the same when several processes share the tokens of their rows, and how they then share them.

A family may look at other tokens in ways that attention by name does not see: states, convolutions, attention of its
own. Its loss may be right to five digits and its gradients useless. So only families pass whose packed documents are
kept apart by their lengths alone (`Family.by_lengths`, from a comparison with the default kernel): their attention goes
through the registry, and nothing else goes from token to token. Of these only those pass whose layers in this very
configuration are attention layers.
"""

from collections import Counter

from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.attention import takes_varlen
from jllm.models.dropout import check_no_chance
from jllm.models.families import shown_by_lengths
from jllm.models.sequence_parallel.share import BALANCED, ULYSSES, RunPlan
from jllm.models.sizes import size_of
from jllm.models.weights.source import rotary_by_length
from jllm.parallel.sequence.runs import TokenCost

OPTION = "--sequence_parallel_size"
_ATTENTION = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers that look at other tokens by attention alone, and whether through a window."""


def check_sequence_parallel(config: PretrainedConfig, family: type[PreTrainedModel], size: int) -> None:
    """Raises:
    UserError: the model was not shown to train the same with so many processes for the tokens of a row.
    """
    given = f"{OPTION} {size}"
    kind, remedy = f"model type {config.model_type!r}", "use --pipe_parallel_size or --model_parallel_size"
    if shown_by_lengths(family) not in ("varlen", "flash"):
        raise UserError(
            f"{given}: {kind} was not shown to look at other tokens through its attention alone (`jllm models`,"
            f" lengths), and would silently train on something else; {remedy}"
        )
    text = config.get_text_config(decoder=True)
    others = sorted({str(each) for each in getattr(text, "layer_types", None) or ()} - set(_ATTENTION))
    if others:
        raise UserError(
            f"{given}: {kind} has layers of kind {others[0]}, which was not shown to look at other tokens through"
            f" attention alone; {remedy}"
        )
    if kinds := rotary_by_length(config):
        raise UserError(
            f"{given}: {kind} has rotary embeddings of kind {sorted(kinds)[0]}, which depend on the longest"
            f" position, and each process has another one; {remedy}"
        )
    check_no_chance(config, given, "processes")


def plan_runs(
    config: PretrainedConfig, family: type[PreTrainedModel], size: int, *, slices: int, mode: str, by_lengths: bool
) -> RunPlan:
    """How `size` processes share the tokens of rows.

    Args:
        config, family: of a model that `check_sequence_parallel` lets pass.
        size: how many processes.
        slices: that attention is cut into beside that.
        mode: `--sequence_parallel_mode`; auto is ulysses where the processes divide a slice's heads: it sends less, and
            shares packed documents evenly too.
        by_lengths: whether there are kernels that take the lengths of documents.

    Raises:
        UserError: ulysses, and the processes do not divide the heads.
    """
    text = config.get_text_config(decoder=True)
    heads = size_of(text, "num_attention_heads")
    divides = heads % (slices * size) == 0
    if mode == ULYSSES and not divides:
        of_slices = f" in {slices} slices" if slices > 1 else ""
        raise UserError(
            f"{OPTION} {size} does not divide the {heads} attention heads{of_slices}; give a divisor, or"
            f" --sequence_parallel_mode {BALANCED}"
        )
    chosen = (ULYSSES if divides else BALANCED) if mode == "auto" else mode
    return RunPlan(mode=chosen, ranks=size, cost=token_cost(text), by_lengths=by_lengths and takes_varlen(family))


def token_cost(text: PretrainedConfig) -> TokenCost:
    """What tokens cost in a model of this configuration, by the sizes that families share: products of its linear maps
    are counted in keys, each of which costs two products of a token's width."""
    layers, width, heads = (size_of(text, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    keys = size_of(text, "num_key_value_heads") or heads
    of_heads = heads * (size_of(text, "head_dim") or width // heads)
    chosen = size_of(text, "num_experts_per_tok")
    inner = size_of(text, "intermediate_size") or 4 * width
    if chosen > 1:
        inner = chosen * (size_of(text, "moe_intermediate_size") or inner)
    linear = 2 * width * of_heads + 2 * width * of_heads * keys // heads + 3 * width * inner
    window = size_of(text, "sliding_window") or None
    default = "full_attention" if window is None else "sliding_attention"
    kinds = Counter(getattr(text, "layer_types", None) or [default] * layers)
    windows: Counter[int | None] = Counter()
    for kind, count in kinds.items():
        windows[window if _ATTENTION.get(str(kind)) else None] += count
    return TokenCost(apart=layers * max(1, linear // (2 * of_heads)), windows=tuple(windows.items()))
