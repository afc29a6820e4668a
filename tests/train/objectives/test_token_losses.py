"""The losses of a token, as their formulas say, with gradients that stay finite."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.errors import UserError
from jllm.train.config import TrainConfig
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.token_losses import summed_loss
from jllm.train.options.objective import LOSSES
from tests.distributed.ranks import Ranks
from tests.train.objectives.heads import LinearHead, chunks_of, micro_batch


def by_formula(logits: torch.Tensor, label: int, kind: str, gamma: float) -> torch.Tensor:
    """One token, in fp64, word for word."""
    p = logits.softmax(-1)[label]
    ce = -p.log()
    sharper = -(gamma * logits).softmax(-1)[label].log()
    return {
        "cross_entropy": ce,
        "focal": (1 - p) ** gamma * ce,
        "star": sharper / gamma,
        "inverse": (1 + p) ** gamma * ce,
        "exponentiated": ce**gamma / gamma,
    }[kind]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(LOSSES),
    gamma=st.floats(0.25, 5),
    size=st.floats(0.1, 10),
    shape=st.sampled_from([(4,), (2, 3), (1, 1)]),
)
def test_values_and_gradients(seed: int, kind: str, gamma: float, size: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    logits = (torch.randn(*shape, 7) * size).requires_grad_()
    labels = torch.randint(0, 7, shape).masked_fill(torch.rand(shape) < 0.3, IGNORE_INDEX)
    exact = logits.detach().double().requires_grad_()
    flat, targets = exact.view(-1, 7), labels.flatten().tolist()
    terms = [by_formula(row, label, kind, gamma) for row, label in zip(flat, targets, strict=True) if label >= 0]
    expected = sum(terms, torch.zeros((), dtype=torch.float64))
    found = summed_loss(logits, labels, kind, gamma)
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    if terms:
        expected.backward()
        assert exact.grad is not None
        assert logits.grad is not None
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_certain_tokens_have_finite_gradients(kind: str, gamma: float, sign: int) -> None:
    """A target of probability 1, or of probability 0, to the last digit."""
    logits = (torch.tensor([[0.0, 200.0, 0.0]]) * sign).requires_grad_()
    loss = summed_loss(logits, torch.tensor([1]), kind, gamma)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_chunks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = LinearHead(torch.float32)
    hidden, fields = micro_batch(torch.float32)
    whole = CrossEntropy(kind, 2.0)(hidden, head, fields).loss
    with chunks_of(5, monkeypatch):
        torch.testing.assert_close(CrossEntropy(kind, 2.0)(hidden, head, fields).loss, whole)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss": "focal"}, "--loss focal needs --loss_gamma, such as 2"),
        ({"loss_gamma": 2.0}, "--loss_gamma 2: --loss cross_entropy has none"),
        ({"loss": "focal", "loss_gamma": 0.0}, "--loss_gamma 0.0: it must be above 0"),
    ],
)
def test_mistakes(more: dict[str, object], message: str) -> None:
    from pathlib import Path

    with pytest.raises(UserError) as refused:
        TrainConfig(model=Path("m"), train_data=("d",), **more)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


def of_parts() -> list[tuple[float, Any]]:
    """Every loss of this rank's part of the logits, and its gradient."""
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.vocabulary import VocabularyShard

    dist.init_process_group("gloo")
    shard = VocabularyShard.of(7, TensorGroup.make(Mesh(tensor=2), dist.get_rank()))
    found = []
    for kind in LOSSES:
        logits, labels = some_logits()
        mine = logits[..., shard.start : shard.stop].clone().requires_grad_()
        loss = summed_loss(mine, labels, kind, 1.5, shard)
        loss.backward()
        assert mine.grad is not None
        found.append((float(loss.detach()), mine.grad.numpy()))
    return found


def some_logits() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 2] = IGNORE_INDEX
    return torch.randn(2, 5, 7, generator=generator) * 4, labels


def test_losses_of_parts_of_the_vocabulary() -> None:
    answers = Ranks(2).run(of_parts)
    for number, kind in enumerate(LOSSES):
        logits, labels = some_logits()
        logits.requires_grad_()
        loss = summed_loss(logits, labels, kind, 1.5)
        loss.backward()
        assert [answer[number][0] for answer in answers] == pytest.approx([float(loss.detach())] * 2, rel=1e-5)
        gradient = torch.cat([torch.from_numpy(answer[number][1]) for answer in answers], -1)
        torch.testing.assert_close(gradient, logits.grad, msg=lambda m, k=kind: f"{k}: {m}")
