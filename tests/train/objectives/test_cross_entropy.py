"""Cross-entropy: zero where nothing is trained on; an evaluation also counts what is ranked first."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.head import Head
from jllm.train.objectives.cross_entropy import CORRECT, CrossEntropy, CrossEntropyAndAccuracy
from jllm.train.objectives.objective import ObjectiveInUse
from tests.train.objectives.heads import (
    BATCH,
    LENGTH,
    LinearHead,
    chunks_of,
    loss_and_gradients,
    micro_batch,
    plain,
)


@pytest.mark.parametrize("tokens", [5, 24])
def test_evaluation_counts_what_is_ranked_first(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = LinearHead(torch.float32)
    hidden, fields = micro_batch(torch.float32)
    with torch.no_grad():
        ranked = head(hidden).argmax(-1)
        fields["labels"][0, :3] = ranked[0, :3]
        expected = int((ranked == fields["labels"]).sum())
        assert 3 <= expected < BATCH * LENGTH
        in_use = ObjectiveInUse(CrossEntropy())
        in_use.use(CrossEntropyAndAccuracy())
        with chunks_of(tokens, monkeypatch):
            losses = [in_use(hidden, head, fields) for _ in range(2)]
        torch.testing.assert_close(losses[0], plain(hidden, head, fields))
        assert in_use.reported(CORRECT) == 2 * expected
        in_use.use(CrossEntropyAndAccuracy())
        assert in_use.reported(CORRECT) == 0


def test_nothing_trained_gives_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        labels = torch.full_like(fields["labels"], IGNORE_INDEX)
        return CrossEntropy()(hidden, head, {"labels": labels}).loss

    for tokens in (5, 24):
        with chunks_of(tokens, monkeypatch):
            assert all(not tensor.any() for tensor in loss_and_gradients(masked, torch.float32))
