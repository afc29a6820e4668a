"""Attention of ranks that share the tokens of rows: one function in transformers' registry, for every family.

    ulysses    tokens for heads: each rank attends over whole rows with its share of the heads, and gives them back
    balanced   keys and values of all tokens up to the end of a rank's run, for its own queries with all heads

Key and value heads that are too few to be shared out are repeated, as often as that takes.

Guarantees: the family's attention over whole rows, its windows, soft caps and sinks with it, and every gradient. Costs:
ulysses sends queries, keys, values and results once in either pass, and keeps a rank's heads of all tokens; balanced
sends keys and values to all ranks, adds up their gradients, and has them whole.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jllm.models.sequence_parallel.seen import Scores, attend
from jllm.models.sequence_parallel.share import ULYSSES, SharedRows
from jllm.parallel.sequence.exchange import gathered, heads_for_tokens, tokens_for_heads

NAME = "shared_rows"


# Ranks have unlike runs, and what passes between them has its own shapes: compiled layers go around it.
@torch.compiler.disable
def shared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    shared_rows: SharedRows | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, heads, own tokens, size] in, [B, own tokens, heads, size] out; causal."""
    assert attention_mask is None, "attention over shared rows takes positions, not masks"
    assert shared_rows is not None, f"{type(module).__name__} does not hand on what it is given for its attention"
    assert not dropout, "attention over shared rows has no dropout"
    group, bounds, seen = shared_rows.group, shared_rows.bounds, shared_rows.seen
    window = sliding_window if sliding_window is not None and sliding_window < bounds[-1] else None
    if shared_rows.mode != ULYSSES:
        key, value = gathered((key, value), group, bounds)
        scores = Scores(scaling=scaling, window=window, softcap=softcap, sinks=s_aux)
        return attend(query, key, value, seen, scores).transpose(1, 2).contiguous(), None
    # As often as it takes for ranks to divide them; they then divide the queries' heads, as ranks do.
    times = math.lcm(key.shape[1], group.size) // key.shape[1]
    key, value = repeat_kv(key, times), repeat_kv(value, times)
    query, key, value = heads_for_tokens((query, key, value), group, bounds)
    sinks = None if s_aux is None else s_aux.chunk(group.size)[group.rank]
    scores = Scores(scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    attended = attend(query, key, value, seen, scores)
    return tokens_for_heads(attended, group, bounds).transpose(1, 2).contiguous(), None


# Registered without a mask function, so that transformers builds no mask.
if NAME not in ALL_ATTENTION_FUNCTIONS:
    AttentionInterface.register(NAME, shared_attention)
