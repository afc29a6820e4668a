"""Losses of pairs are their formulas in fp64, with all their digits where probabilities are near 0 and 1."""

from collections import deque

import pytest
import torch
from torch import Tensor

from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.objectives.preference import (
    NAMES_OF_SUMS,
    PAIRS,
    PairLoss,
    PairSums,
    Preference,
    ReferenceLogps,
    packed_documents,
    unpacked_documents,
)
from jllm.train.options.objective import PREFERENCE_LOSSES, WITHOUT_REFERENCE
from tests.distributed.pairs_reference import pair_losses
from tests.train.objectives.product_heads import ProductHead

torch.set_num_threads(1)


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 300, (40, 2), generator=generator)
    logps = -counts * (0.01 + 3 * torch.rand(40, 2, generator=generator, dtype=torch.float64))
    return logps, counts, logps + 5 * torch.randn(40, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ftx", [0.0, 0.7])
@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
def test_values_and_gradients(kind: str, ftx: float) -> None:
    logps, counts, references = numbers()
    more = {"beta": 0.3, "smoothing": 0.2 if kind == "dpo" else 0.0, "gamma": 0.4, "ftx": ftx}
    found, expected = (logps.clone().requires_grad_() for _ in range(2))
    losses, rewards = PairLoss(kind=kind, **more)(found, counts, references)
    wanted = pair_losses(expected, counts, references, kind=kind, **more)
    torch.testing.assert_close(losses, wanted, rtol=1e-9, atol=1e-12)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    wanted.sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-8, atol=1e-12)
    compared = logps / counts if kind in WITHOUT_REFERENCE else logps - references
    torch.testing.assert_close(rewards, 0.3 * compared)


def test_odds_near_certainty() -> None:
    """log(1 - exp(x)) has all its digits at x = -1e-10, where fp32, or log1p(-exp(x)), has none."""
    logps = torch.tensor([[-1e-10, -40.0]], dtype=torch.float64, requires_grad=True)
    losses, _ = PairLoss(kind="orpo", beta=1.0)(logps, torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    odds = -1e-10 - torch.tensor(1e-10, dtype=torch.float64).log() + 40.0
    torch.testing.assert_close(losses, 1e-10 - torch.nn.functional.logsigmoid(odds)[None], rtol=1e-9, atol=0)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert logps.grad is not None
    assert logps.grad.isfinite().all()
    certain = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    losses, _ = PairLoss(kind="orpo", beta=1.0)(certain, torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2))
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert certain.grad is not None
    assert certain.grad.isfinite().all()


def test_numbers_travel_as_bits() -> None:
    values = torch.tensor([-1908.25, -0.0, 3.4e38, -1e-45, 0.0, -7.5])
    order = torch.tensor([0, 5, 2**31 - 1, 7, 8, 1])
    found, again = unpacked_documents(packed_documents(order, values))
    assert torch.equal(found, order)
    assert torch.equal(again.view(torch.int32), values.view(torch.int32))


def micro_batch(references: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Two pairs in one row, and a row that is filling."""
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 12, 8, generator=generator)
    labels = torch.randint(0, 50, (2, 12), generator=generator)
    documents = torch.tensor([[0] * 3 + [1] * 3 + [2] * 2 + [3] * 4, [0] * 12])
    labels[0, [0, 3, 6, 8]] = -100
    labels[1] = -100
    planted = torch.zeros(2, 12)
    planted[0, [0, 3, 6, 8]] = references
    return hidden, {"labels": labels, "documents": packed_documents(documents, planted)}


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
@pytest.mark.parametrize("is_fused", [False, True])
def test_a_micro_batch(kind: str, is_fused: bool) -> None:
    """The sum over its pairs, and nothing of what is filling; references out of rows or of a pass before."""
    head, references = ProductHead(50, 8), torch.tensor([-3.0, -9.0, -4.5, -17.25])
    hidden, fields = micro_batch(references)
    hidden.requires_grad_()
    made = ReferenceLogps(is_fused=is_fused)
    made(hidden, head, fields)
    [logps] = made.found
    pairs, counts = logps[:4].view(2, 2), torch.tensor([[2, 2], [1, 3]])
    loss = PairLoss(kind=kind, beta=0.3, ftx=0.1)
    expected, rewards = loss(pairs, counts, references.double().view(2, 2))
    sums = Preference(loss, is_fused=is_fused)(hidden, head, fields)
    assert float(sums.loss.detach()) == pytest.approx(float(expected.sum()), rel=1e-5)
    told = PairSums(**dict(zip(NAMES_OF_SUMS, sums.reported[PAIRS].tolist(), strict=True)))
    assert told.pairs == 2
    assert told.loss == pytest.approx(float(expected.sum()), rel=1e-6)
    assert told.chosen == pytest.approx(float(rewards[:, 0].sum()), rel=1e-6)
    assert told.chosen_logps == pytest.approx(float(pairs[:, 0].sum()), rel=1e-6)
    sums.loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[1].any(), "of filling"
    before = torch.zeros(24, dtype=torch.float64)
    before[:4] = references
    again = Preference(loss, is_fused=is_fused, references=deque([before]))(hidden, head, fields)
    assert torch.equal(again.loss, sums.loss)


def test_only_filling() -> None:
    head = ProductHead(50, 8)
    hidden, fields = micro_batch(torch.zeros(4))
    hidden.requires_grad_()
    fields["labels"] = torch.full_like(fields["labels"], -100)
    in_use = ObjectiveInUse(Preference(PairLoss(kind="orpo", beta=0.1)))
    loss = in_use(hidden, head, fields)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert in_use.all_reported(PAIRS, len(NAMES_OF_SUMS)) == [0.0] * len(NAMES_OF_SUMS)


def test_records() -> None:
    assert PairSums().record() == {}
    found = (
        PairSums(pairs=3, chosen=6, rejected=-3, right=2, chosen_logps=-30, rejected_logps=-60) + PairSums()
    ).record()
    assert found == {
        "pairs": 3, "rewards/chosen": 2, "rewards/rejected": -1, "rewards/margins": 3,
        "rewards/accuracies": pytest.approx(2 / 3), "logps/chosen": -10, "logps/rejected": -20,
    }  # fmt: skip
