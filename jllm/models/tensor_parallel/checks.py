"""Which models can be cut into how many slices (tensor parallelism), by their configurations.

Costs nothing: no model is built.
"""

import re

from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.dropout import check_no_chance
from jllm.models.families import NOT_SLICED, VOCABULARY, shown_slices
from jllm.models.sizes import size_of, sizes_of
from jllm.models.tensor_parallel.plans import has_packed_qkv
from jllm.parallel.tensor.slices import chunk

OPTION = "--model_parallel_size"
_HEADS = re.compile(r"(?!.*index).*attention_heads")
_SHARED_HEADS = re.compile(r"(?!.*index).*(key_value|kv)_heads")


def check_tensor_parallel(
    config: PretrainedConfig, family: type[PreTrainedModel], size: int, *, sharded_norms: bool = False
) -> None:
    """Raises:
    UserError: the model cannot be cut into so many slices, or was not shown to compute the same then, or with
        `sharded_norms`.
    """
    if size == 1:
        return
    given, kind = f"{OPTION} {size}", f"model type {config.model_type!r}"
    shown = shown_slices(family)
    if shown.how == NOT_SLICED:
        raise UserError(
            f"{given}: {kind} was not shown to train the same in slices ({shown.why}); use --pipe_parallel_size, and"
            " `jllm models` for the families that were"
        )
    if sharded_norms and not shown.sharded_norms:
        raise UserError(
            f"--sequence_sharded_norms: {kind} was not shown to train the same when slices share the tokens between"
            " its attention and mlp; drop it"
        )
    text = config.get_text_config(decoder=True)
    if shown.how != VOCABULARY:
        _check_heads(config, given, size, shares_heads=shown.shares_heads)
    for name in ("vocab_size", "intermediate_size", "moe_intermediate_size"):
        for length in sizes_of(text, name):
            if length and chunk(length, size, size - 1)[0] >= length:
                raise UserError(f"{given}: {name} {length} leaves nothing for the last process; give less")
    check_no_chance(config, given, "slices")


def shared_heads(config: PretrainedConfig) -> int:
    """How many key and value heads a model has."""
    text = config.get_text_config(decoder=True)
    return size_of(text, "num_key_value_heads") or size_of(text, "num_attention_heads")


def sharers(config: PretrainedConfig, size: int) -> int:
    """How many of `size` ranks share one key/value head."""
    return max(1, size // max(1, shared_heads(config)))


def _check_heads(config: PretrainedConfig, given: str, size: int, *, shares_heads: bool) -> None:
    text, kind = config.get_text_config(decoder=True), f"model type {config.model_type!r}"
    for queries in _all_sizes(text, _HEADS):
        if queries % size:
            raise UserError(f"{given} does not divide the {queries} attention heads; give a divisor of {queries}")
    most, counts = shared_heads(config), {shared_heads(config), *_all_sizes(text, _SHARED_HEADS)}
    for keys in sorted(counts):
        if keys % size and size % keys:
            raise UserError(
                f"{given}: neither it nor the {keys} key and value heads divide the other; give a divisor or a"
                f" multiple of {keys}"
            )
        if size > keys and (has_packed_qkv(config) or not shares_heads or keys != most):
            is_packed = has_packed_qkv(config)
            why = "lie in one parameter with the queries and are not" if is_packed else "were not shown to be"
            raise UserError(f"{given}: the {keys} key and value heads of {kind} {why} shared; give at most {keys}")


def _all_sizes(text: PretrainedConfig, names: re.Pattern[str]) -> set[int]:
    """All sizes above 0 of such names."""
    return {size for name in vars(text) if names.fullmatch(name) for size in sizes_of(text, name) if size}
