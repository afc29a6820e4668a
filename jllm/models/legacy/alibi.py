"""Llama with ALiBi in place of rotary positions: what Baichuan 13B is.

transformers has no such class. This one is its Llama with two parts exchanged: the rotary table turns nothing, and the
attention adds to each head's scores a slope times the key's distance from the query. Distances within a document are
those within its row, so packed rows need nothing more. Stages, checkpoints and the packed block mask are Llama's own.

Costs: each layer makes one mask of heads x S x S in the dtype of the scores, and keeps it for the backward pass.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ALIBI = "alibi"


class AlibiLlamaConfig(LlamaConfig):
    """Llama's configuration, of the other class."""

    model_type = "baichuan"
    normalised_head: bool = False
    """Whether the head's rows are scaled to length 1 in every pass, as Baichuan2 does."""


class NoRotation(nn.Module):
    """A rotary table that leaves queries and keys as they are."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine 1 and sine 0, which broadcast over rows and positions."""
        return hidden.new_ones(1, 1, self.size), hidden.new_zeros(1, 1, self.size)


class NormalisedHead(nn.Linear):
    """A head whose rows count by their direction only."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits with rows of length 1."""
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class AlibiLlamaForCausalLM(LlamaForCausalLM):
    """Llama with ALiBi. It has one attention of its own, and ignores which one is asked for."""

    config: AlibiLlamaConfig

    def __init__(self, config: AlibiLlamaConfig) -> None:
        config._attn_implementation = ALIBI
        super().__init__(config)
        self.model.rotary_emb = NoRotation(config.head_dim or config.hidden_size // config.num_attention_heads)
        if config.normalised_head:
            self.lm_head = NormalisedHead(config.hidden_size, config.vocab_size, bias=False)


def slopes(heads: int) -> list[float]:
    """The slope of each head: a geometric series; between two powers of 2, every second one of the longer series."""
    if heads & (heads - 1) == 0:
        start = 2.0 ** (-8.0 / heads)
        return [start ** (index + 1) for index in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return slopes(closest) + slopes(2 * closest)[0::2][: heads - closest]


def alibi_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """SDPA with the bias added to the scores, where `attention_mask` [B, 1, queries, keys] is true."""
    assert attention_mask is not None, "ALiBi's mask is always made"
    assert attention_mask.dtype == torch.bool, "ALiBi takes masks that say which keys are seen"
    batch, heads, length, size = *query.shape[:3], key.shape[2]
    steps = torch.arange(size, device=query.device, dtype=torch.float32)
    distance = steps - steps[size - length :, None]
    slope = torch.tensor(slopes(heads), device=query.device)[:, None, None]
    # A softmax takes the distance to any fixed key. From the query's own, what rounding to half precision takes grows
    # with the distance and vanishes with the weight: keys that count are told apart, wherever in a row they are.
    bias = torch.empty(batch, heads, length, size, dtype=query.dtype, device=query.device)
    torch.mul(slope, distance.expand(batch, 1, -1, -1), out=bias)
    bias.masked_fill_(~attention_mask, torch.finfo(bias.dtype).min)
    attended: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, bias, **arguments)
    return attended


def alibi_mask(**arguments: Any) -> Tensor:
    """SDPA's mask, also where plain causality needs none: the bias is merged into a mask of that size anyway."""
    mask = sdpa_mask(**arguments | {"allow_is_causal_skip": False})
    assert isinstance(mask, Tensor)
    return mask


AttentionInterface.register(ALIBI, alibi_attention)
AttentionMaskInterface.register(ALIBI, alibi_mask)
