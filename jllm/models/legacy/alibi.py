"""Llama with ALiBi in place of rotary positions: what Baichuan 13B is.

transformers has no such class. This one is its Llama with two parts exchanged: the rotary table turns nothing, and the
attention adds to each head's scores a slope times the key's position. Only differences of positions within a document
count, so packed rows need nothing more. Stages, checkpoints and the packed block mask are Llama's own.
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
    """SDPA with the bias added to the scores. A row's constant does not matter to its softmax, so the key's position
    in the row does for its distance."""
    steps = torch.arange(key.shape[2], device=query.device, dtype=torch.float32)
    slope = torch.tensor(slopes(query.shape[1]), device=query.device)
    # Distances to the last key, as published: the largest bias is 0, and far keys lose precision, not near ones.
    bias = (slope[:, None, None] * (steps - (key.shape[2] - 1))).to(query.dtype)[None]
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_bias=bias, **arguments
    )
    return attended


AttentionInterface.register(ALIBI, alibi_attention)
AttentionMaskInterface.register(ALIBI, sdpa_mask)
