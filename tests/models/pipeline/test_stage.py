"""Chained stages equal the whole model: loss, every gradient, packed rows, tied or not; and so do saved stages."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.models.chain import (
    chained_loss_and_gradients,
    kept_logits,
    load_chain,
    packed_batch,
    whole_loss_and_gradients,
    worst_gradient,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 1, 3, 4]])
def test_chain_equals_whole_in_eager_attention(family_folder: Path, boundaries: list[int]) -> None:
    """`test_families` compares with SDPA."""
    whole = AutoModelForCausalLM.from_pretrained(
        family_folder, dtype=torch.float32, attn_implementation="eager"
    ).train()
    stages = load_chain(family_folder, boundaries, attn_implementation="eager")
    for packed in (False, True):
        ids, integers = packed_batch(96, packed=packed)
        loss, gradients = whole_loss_and_gradients(whole, ids, integers)
        chained_loss, chained = chained_loss_and_gradients(stages, ids, integers)
        torch.testing.assert_close(chained_loss, loss, atol=1e-5, rtol=0)
        assert worst_gradient(gradients, chained)[0] < 1e-5, worst_gradient(gradients, chained)


def test_packed_documents_do_not_see_each_other(family_folder: Path) -> None:
    stages = load_chain(family_folder, [0, 2, 4])
    logits: list[torch.Tensor] = []
    stages[-1].objective = kept_logits(logits)
    ids, integers = packed_batch(96)
    chained_loss_and_gradients(stages, ids, integers)
    alone = torch.stack([torch.full((1, 9), -100), torch.arange(9)[None]])
    chained_loss_and_gradients(stages, ids[:1, 5:14], alone)
    torch.testing.assert_close(logits[0][:1, 5:14], logits[1], atol=1e-5, rtol=1e-5)
    integers[1] = torch.arange(24)
    chained_loss_and_gradients(stages, ids, integers)
    assert (logits[2][:1, 5:14] - logits[1]).abs().max() > 1e-3
