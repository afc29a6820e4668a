"""Preference losses as one writes them down, over padded pairs that are not packed, by plain transformers: what packed
pairs in a pipeline have to equal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from tests.data.pairs import Pair


def side_logps(model: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities of the answers, [P, 2] chosen and rejected, and how many tokens these have."""
    sides = [(prompt, answer) for prompt, *answers in pairs for answer in answers]
    longest = max(len(prompt) + len(answer) for prompt, answer in sides)
    ids = torch.zeros(len(sides), longest, dtype=torch.long)
    there, trained = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(sides):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        there[row, : len(prompt) + len(answer)] = 1
        trained[row, len(prompt) : len(prompt) + len(answer)] = 1
    logits = model(input_ids=ids, attention_mask=there).logits[:, :-1]
    found = log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return (found * trained[:, 1:]).sum(-1).view(-1, 2), trained[:, 1:].sum(-1).view(-1, 2)


def pair_losses(
    logps: Tensor,
    counts: Tensor,
    references: Tensor,
    *,
    kind: str,
    beta: float,
    smoothing: float = 0.0,
    gamma: float = 0.5,
    ftx: float = 0.0,
) -> Tensor:
    """[P]; logps, counts and references are [P, 2]."""
    mean, change = logps / counts, logps - references
    delta = change[:, 0] - change[:, 1]
    odds = mean - (1 - mean.exp()).log()
    losses = {
        "dpo": -(1 - smoothing) * logsigmoid(beta * delta) - smoothing * logsigmoid(-beta * delta),
        "ipo": ((change / counts)[:, 0] - (change / counts)[:, 1] - 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - torch.sigmoid(beta * change[:, 0]) + torch.sigmoid(beta * change[:, 1]),
        "apo_down": torch.sigmoid(beta * change[:, 0]) + 1 - torch.sigmoid(beta * delta),
        "orpo": -mean[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1]),
        "simpo": -logsigmoid(beta * (mean[:, 0] - mean[:, 1] - gamma / beta)),
    }
    return losses[kind] - ftx * mean[:, 0]


def train_on_pairs(
    folder: Path, batches: Sequence[Sequence[Pair]], *, rate: float, reference: Path | None = None, **loss: Any
) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms, and the weights after a step of plain SGD for each batch, in fp64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    before = AutoModelForCausalLM.from_pretrained(reference or folder, dtype=torch.float64)
    losses, norms = [], []
    for pairs in batches:
        with torch.no_grad():
            references, _ = side_logps(before, pairs)
        logps, counts = side_logps(model, pairs)
        value = pair_losses(logps, counts, references, **loss).mean()
        model.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        losses.append(float(value))
        norms.append(float(torch.stack([each.norm() for each in gradients]).norm()))
        with torch.no_grad():
            for each in model.parameters():
                if each.grad is not None:
                    each -= rate * each.grad
    return losses, norms, {name: each.detach() for name, each in model.state_dict().items()}
