"""NEFTune: noise while training alone, of the size that its formula says, as transformers itself makes it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.neftune import neftune_post_forward_hook

from jllm.models.embedding_noise import attach_noise
from jllm.models.pipeline.span import spans_of
from tests.fixtures import tiny_llama
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch


@settings(max_examples=20, deadline=None)
@given(alpha=st.floats(0.1, 50), rows=st.integers(1, 3), length=st.integers(1, 40), width=st.integers(1, 64))
def test_the_noise_is_that_of_transformers(alpha: float, rows: int, length: int, width: int) -> None:
    ids = torch.zeros(rows, length, dtype=torch.int64)
    embeddings = []
    for _ in range(2):
        torch.manual_seed(3)
        embeddings.append(torch.nn.Embedding(5, width).train())
    ours, theirs = embeddings

    class Model(torch.nn.Module):
        def get_input_embeddings(self) -> torch.nn.Module:
            return ours

    attach_noise(Model(), spans_of([0, 1])[0], alpha)  # type: ignore[arg-type]
    theirs.neftune_noise_alpha = alpha  # type: ignore[assignment]
    theirs.register_forward_hook(neftune_post_forward_hook)
    torch.manual_seed(7)
    found = ours(ids)
    torch.manual_seed(7)
    torch.testing.assert_close(found, theirs(ids), atol=1e-6, rtol=1e-6)
    noise = (found - ours.weight[0]).detach()
    most = alpha / math.sqrt(length * width)
    assert float(noise.abs().max()) <= most * (1 + 1e-4) + 1e-5
    assert torch.equal(ours.eval()(ids), ours.weight[ids])


@pytest.mark.parametrize("boundaries", [[0, 4], [0, 2, 4]])
def test_on_the_first_stage_and_in_training_alone(tmp_path: Path, boundaries: list[int]) -> None:
    tiny_llama(tmp_path, tied=True)
    ids, integers = packed_batch(97)
    plain, _ = chained_loss_and_gradients(load_chain(tmp_path, boundaries), ids, integers)
    stages = load_chain(tmp_path, boundaries)
    for stage in stages:
        attach_noise(stage.model, stage.span, 5.0)
    noisy = [float(chained_loss_and_gradients([each.train() for each in stages], ids, integers)[0]) for _ in range(2)]
    assert len({*noisy, float(plain)}) == 3
    calm, _ = chained_loss_and_gradients([each.eval() for each in stages], ids, integers)
    assert torch.equal(calm, plain)
