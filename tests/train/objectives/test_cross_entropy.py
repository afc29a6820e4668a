"""Cross-entropy: zero where nothing is trained on; an evaluation also counts what is ranked first."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.models.pipeline.head import Head
from jllm.train.objectives import cross_entropy
from jllm.train.objectives.cross_entropy import (
    CORRECT,
    ENTROPIES,
    LOSSES,
    TOP5,
    CrossEntropy,
    CrossEntropyAndAccuracy,
)
from jllm.train.objectives.histogram import BINS, histogram
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


@pytest.mark.parametrize(("tokens", "block"), [(5, 3), (24, 1), (24, 24)])
def test_evaluation_counts_ranks_losses_and_entropies(tokens: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one would write them down, whatever the chunks and blocks; a logit of -inf is an id that never comes."""
    head = LinearHead(torch.float32)
    hidden, fields = micro_batch(torch.float32)
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", block * head.vocabulary)

    class Masked(Head):
        def __call__(self, hidden: Tensor) -> Tensor:
            return head(hidden).index_fill(-1, torch.tensor([7]), -torch.inf)

    fields["labels"][fields["labels"] == 7] = 8
    with torch.no_grad():
        by_rank = Masked(head.vocabulary)(hidden).argsort(-1, descending=True)
        for rank, place in enumerate((0, 1, 2, 7, 8, 9, 10, 11)):
            fields["labels"][0, place] = by_rank[0, place, rank]
        in_use = ObjectiveInUse(CrossEntropyAndAccuracy())
        with chunks_of(tokens, monkeypatch):
            in_use(hidden, Masked(head.vocabulary), fields)
        logits, labels = Masked(head.vocabulary)(hidden).flatten(0, 1), fields["labels"].flatten()
    trained = labels != IGNORE_INDEX
    logits, labels = logits[trained], labels[trained]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(-1)
    assert in_use.reported(TOP5) == int((ranks < 5).sum()) > in_use.reported(CORRECT)
    of_tokens = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    entropies = torch.distributions.Categorical(logits=logits.clamp(min=-1e30)).entropy()
    for name, numbers in ((LOSSES, of_tokens), (ENTROPIES, entropies)):
        found = torch.tensor(in_use.all_reported(name, BINS)).cumsum(0)
        # A number on the edge of two bins may fall into either.
        assert int((found - histogram(numbers, torch.ones_like(labels).bool()).cumsum(0)).abs().max()) <= 1
        assert int(found[-1]) == len(labels)
    assert ObjectiveInUse(CrossEntropy()).all_reported(LOSSES, 3) == [0, 0, 0]


def test_nothing_trained_gives_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    def masked(hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        labels = torch.full_like(fields["labels"], IGNORE_INDEX)
        return CrossEntropy()(hidden, head, {"labels": labels}).loss

    for tokens in (5, 24):
        with chunks_of(tokens, monkeypatch):
            assert all(not tensor.any() for tensor in loss_and_gradients(masked, torch.float32))
