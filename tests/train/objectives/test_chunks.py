"""Sums in chunks: one is the plain loss bit for bit, several are its sum; their logits never coexist."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from jllm.models.pipeline import head as head_module
from jllm.models.pipeline.head import Head, LogitsGiven
from jllm.train.objectives.cross_entropy import CrossEntropy, CrossEntropyAndAccuracy
from jllm.train.objectives.objective import Objective, ObjectiveInUse
from tests.models.chain import chained_loss_and_gradients, load_chain, packed_batch, worst_gradient
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config
from tests.train.objectives.heads import (
    BATCH,
    LENGTH,
    VOCABULARY,
    WIDTH,
    chunks_of,
    loss_and_gradients,
    micro_batch,
    plain,
    summed,
)

OBJECTIVES = (CrossEntropy(), CrossEntropyAndAccuracy())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
def test_one_chunk_is_the_plain_loss(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = loss_and_gradients(plain, torch.float32)
    assert len(expected) == 6
    with chunks_of(BATCH * LENGTH, monkeypatch):
        found = loss_and_gradients(summed(objective), torch.float32)
    assert all(one.equal(other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 12, 23])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: type(each).__name__)
def test_chunks_are_the_whole(
    objective: Objective, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient; the loss itself is in fp32, whatever the hidden states are."""
    expected = loss_and_gradients(plain, dtype)
    with chunks_of(tokens, monkeypatch):
        found = loss_and_gradients(summed(objective), dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2}[dtype]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is as wide as the vocabulary, and how often a head ran."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default) and _is_logits(result)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if _is_logits(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def _is_logits(tensor: Any) -> bool:
    """[tokens, vocabulary] or [B, S, vocabulary]: not a weight, [vocabulary, width] or the other way round."""
    is_wide = isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY
    return is_wide and tensor.shape[-2] != WIDTH


@pytest.mark.parametrize("tokens", [1, 5, 12, 24])
def test_the_peak_is_one_chunk(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with chunks_of(tokens, monkeypatch), Largest() as seen:
        loss_and_gradients(summed(CrossEntropy()), torch.float32)
    assert seen.elements == tokens * VOCABULARY
    chunks = -(-BATCH * LENGTH // tokens)
    # The projection runs once for each chunk, and again in the backward pass where there are several.
    assert seen.products == chunks * (2 if chunks > 1 else 1)


def test_logits_given_are_taken_in_chunks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(BATCH, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    fields = micro_batch(torch.float32)[1]
    with chunks_of(5, monkeypatch):
        found = CrossEntropy()(logits, LogitsGiven(VOCABULARY), fields).loss
    torch.testing.assert_close(found, plain(logits, LogitsGiven(VOCABULARY), fields))


@pytest.mark.parametrize("family", ["gemma2", "mixtral", "granite"])
def test_chunks_on_the_last_of_two_stages(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and every gradient of the model, a tied head among them; one chunk is the plain loss of the whole model."""
    make_folder(tiny_config(family), tmp_path)
    batch = packed_batch(96, packed=False)
    found = []
    for elements in (96 * 48, 96 * 7):
        with monkeypatch.context() as changed:
            changed.setattr(head_module, "CHUNK_ELEMENTS", elements)
            stages = load_chain(tmp_path, [0, 2, 4], objective=ObjectiveInUse(CrossEntropy()))
            found.append(chained_loss_and_gradients(stages, *batch))
    (whole, gradients), (loss, chunked) = found
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    assert worst_gradient(gradients, chunked)[0] < 1e-5

    def plain_sum(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        logits = head(hidden)
        return cross_entropy(logits.float().view(-1, 96), fields["labels"].reshape(-1), reduction="sum")

    expected, exact = chained_loss_and_gradients(load_chain(tmp_path, [0, 2, 4], objective=plain_sum), *batch)
    assert whole.equal(expected)
    assert exact.keys() == gradients.keys()
    assert all(exact[name].equal(gradients[name]) for name in exact)
