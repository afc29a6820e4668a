"""Losses of preference pairs: documents 2k and 2k + 1 of a micro-batch are the chosen and the rejected side of one.

With logp the summed log-probability of a side's answer under the model, ref the same under the reference, and avg the
mean over its tokens; each summed over pairs:

* `dpo`: -log s(b D), D = (logp - ref)_chosen - (logp - ref)_rejected; with label smoothing e,
  -(1 - e) log s(b D) - e log s(-b D)
* `ipo`: (d - 1 / (2 b))^2, d as D with avg in place of sums
* `apo_zero`: (1 - s(r_chosen)) + s(r_rejected), r = b (logp - ref)
* `apo_down`: s(r_chosen) + (1 - s(r_chosen - r_rejected))
* `orpo`: -avg_chosen - b log s(log-odds ratio of avg), both over the answers alone
* `simpo`: -log s(b (avg_chosen - avg_rejected) - g)

s is the logistic function. `ftx` times the mean cross-entropy of the chosen answer's tokens may be added to each.

What is reported of pairs (`PairSums`) counts rewards: b (logp - ref), of `orpo` and `simpo` b avg. All of a pair is
computed in fp64: there are few pairs, and a sum of a thousand tokens has no digits to spare in fp32.

Where ranks share the tokens of rows, each of them has the sums of whole answers, and the gradients of its own tokens;
the first one alone has the pairs' losses and numbers, so that they count once.

Costs: those of `jllm.train.objectives.log_probabilities`.
"""

import dataclasses
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from jllm.models.pipeline.bundle import DOCUMENTS, LABELS
from jllm.models.pipeline.head import Head
from jllm.models.sequence_parallel.share import OwnPlanes
from jllm.train.objectives.log_probabilities import DocumentSums, document_sums
from jllm.train.objectives.objective import Sums
from jllm.train.options.objective import WITHOUT_REFERENCE

PAIRS = "pairs"
"""The reported sums of pairs, in the order of `PairSums`."""
_REFERENCE_SHIFT = 32
_NUMBER = (1 << _REFERENCE_SHIFT) - 1
_CERTAIN = -1e-12
"""A mean log-probability above this counts as this where the odds would be infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairSums:
    """Sums over pairs, as records tell the means of them."""

    pairs: float = 0.0
    loss: float = 0.0
    chosen: float = 0.0
    rejected: float = 0.0
    right: float = 0.0
    chosen_logps: float = 0.0
    rejected_logps: float = 0.0

    def __add__(self, other: "PairSums") -> "PairSums":
        return PairSums(**{name: getattr(self, name) + getattr(other, name) for name in NAMES_OF_SUMS})

    def record(self) -> dict[str, float]:
        """As the records of a run have it; nothing of no pairs."""
        if not self.pairs:
            return {}
        return {
            "pairs": self.pairs,
            "rewards/chosen": self.chosen / self.pairs,
            "rewards/rejected": self.rejected / self.pairs,
            "rewards/margins": (self.chosen - self.rejected) / self.pairs,
            "rewards/accuracies": self.right / self.pairs,
            "logps/chosen": self.chosen_logps / self.pairs,
            "logps/rejected": self.rejected_logps / self.pairs,
        }


NAMES_OF_SUMS = tuple(field.name for field in dataclasses.fields(PairSums))


def packed_documents(numbers: Tensor, references: Tensor) -> Tensor:
    """The plane of documents: their numbers, and in the upper half the bits of fp32 numbers beside them."""
    return numbers | references.float().contiguous().view(torch.int32).long() << _REFERENCE_SHIFT


def unpacked_documents(plane: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `packed_documents`."""
    return plane & _NUMBER, (plane >> _REFERENCE_SHIFT).to(torch.int32).view(torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairLoss:
    """What a pair adds to the loss.

    Attributes:
        kind, beta, smoothing, gamma, ftx: see the module.
    """

    kind: str
    beta: float
    smoothing: float = 0.0
    gamma: float = 0.5
    ftx: float = 0.0

    def __call__(self, logps: Tensor, counts: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """Of the sides of pairs, [P, 2] each: losses [P], and the rewards of both sides [P, 2]."""
        averages = logps / counts
        changes = logps - references
        beta = self.beta
        rewards = beta * (averages if self.kind in WITHOUT_REFERENCE else changes)
        margins = rewards[:, 0] - rewards[:, 1]
        if self.kind == "dpo":
            losses = -(1 - self.smoothing) * logsigmoid(margins) - self.smoothing * logsigmoid(-margins)
        elif self.kind == "ipo":
            mean = changes / counts
            losses = (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)).square()
        elif self.kind == "apo_zero":
            losses = torch.sigmoid(-rewards[:, 0]) + torch.sigmoid(rewards[:, 1])
        elif self.kind == "apo_down":
            losses = torch.sigmoid(rewards[:, 0]) + torch.sigmoid(-margins)
        elif self.kind == "orpo":
            odds = averages - _log_of_rest(averages)
            losses = -averages[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])
        else:
            assert self.kind == "simpo", self.kind
            losses = -logsigmoid(margins - self.gamma)
        if self.ftx:
            losses = losses - self.ftx * averages[:, 0]
        return losses, rewards.detach()


def _log_of_rest(logarithms: Tensor) -> Tensor:
    """log(1 - exp(x)) of numbers below 0, with all their digits near 0 and far from it."""
    below = logarithms.clamp(max=_CERTAIN)
    is_near = below > -0.6931
    near, far = torch.where(is_near, below, -0.5), torch.where(is_near, -1.0, below)
    return torch.where(is_near, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


class Preference:
    """The objective of pairs: needs the planes `LABELS` and `DOCUMENTS`.

    Args:
        loss: of a pair.
        is_fused: as for `jllm.train.objectives.log_probabilities`.
        references: of each micro-batch that comes, in their order, in place of those in the plane.
    """

    def __init__(self, loss: PairLoss, *, is_fused: bool = False, references: deque[Tensor] | None = None) -> None:
        self._loss, self._is_fused, self._references = loss, is_fused, references

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor], gradient: float | None = None) -> Sums:
        """The summed losses of pairs, and the sums that records tell of them."""
        numbers, planted = unpacked_documents(fields[DOCUMENTS])
        shared = _shared(fields)
        found = document_sums(hidden, head, fields[LABELS], numbers, is_fused=self._is_fused, shared=shared)
        if self._references is None:
            references = torch.zeros_like(found.logps)
            # Exact in any order: all of a document's numbers but one are 0.
            references.index_add_(0, numbers.flatten(), planted.flatten().double())
            if shared is not None:
                references = shared.group.total(references)
        else:
            references = self._references.popleft()
        is_pair = (found.counts.view(-1, 2) > 0).all(1)
        logps, counts, references = _or_nothing(found, references, is_pair)
        losses, rewards = self._loss(logps, counts, references)
        loss = torch.where(is_pair, losses, 0.0).sum()
        told = [
            torch.ones_like(losses),
            losses.detach(),
            rewards[:, 0],
            rewards[:, 1],
            (rewards[:, 0] > rewards[:, 1]).double(),
            logps[:, 0].detach(),
            logps[:, 1].detach(),
        ]
        sums = torch.stack([torch.where(is_pair, each, 0.0).sum() for each in told])
        if shared is not None and not shared.group.is_first:
            # Its own tokens need the gradient all the same.
            loss, sums = loss - loss.detach(), torch.zeros_like(sums)
        return Sums(loss=loss.float(), reported={PAIRS: sums})


def _shared(fields: Mapping[str, Tensor]) -> OwnPlanes | None:
    """What the planes are where ranks share the tokens of rows; None where rows are whole."""
    return fields if isinstance(fields, OwnPlanes) else None


def _or_nothing(found: DocumentSums, references: Tensor, is_pair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[P, 2] each; where there is no pair, numbers of which every loss has a finite value and gradient."""
    there = is_pair[:, None]
    return (
        torch.where(there, found.logps.view(-1, 2), -1.0),
        torch.where(there, found.counts.view(-1, 2), 1),
        torch.where(there, references.view(-1, 2), -1.0),
    )


class ReferenceLogps:
    """The objective of a forward pass that makes references: keeps the log-probabilities of each micro-batch's
    documents, [D] fp64, in the order in which they come."""

    def __init__(self, *, is_fused: bool = False) -> None:
        self.found: deque[Tensor] = deque()
        self._is_fused = is_fused

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor], gradient: float | None = None) -> Sums:
        """0: what is asked for is kept."""
        numbers, _ = unpacked_documents(fields[DOCUMENTS])
        with torch.no_grad():
            found = document_sums(
                hidden, head, fields[LABELS], numbers, is_fused=self._is_fused, shared=_shared(fields)
            )
        self.found.append(found.logps.float().double())
        return Sums(loss=found.logps.new_zeros((), dtype=torch.float32))
