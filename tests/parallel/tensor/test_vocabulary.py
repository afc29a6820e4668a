"""Logits in parts: the cross-entropy of all of them, and its gradients."""

from typing import Any

from tests.distributed.ranks import Ranks

VOCABULARY, TOKENS = 11, 9


def numbers() -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCABULARY, generator=generator) * 30
    logits[0, 3] = float("-inf")
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[:2] = torch.tensor([5, 10])
    return logits, targets, torch.rand(TOKENS, generator=generator)


def of_part(size: int) -> Any:
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.vocabulary import VocabularyShard, cross_entropies

    dist.init_process_group("gloo")
    group = TensorGroup.make(Mesh(tensor=size), dist.get_rank())
    shard = VocabularyShard.of(VOCABULARY, group)
    logits, targets, weights = numbers()
    mine = logits[:, shard.start : shard.stop].clone().requires_grad_()
    losses = cross_entropies(mine, targets, shard)
    (losses * weights).sum().backward()
    beside = shard.side_by_side(logits[:, shard.start : shard.start + 2])
    assert mine.grad is not None
    return losses.detach().numpy(), mine.grad.numpy(), beside.numpy(), (shard.largest, shard.has(0), shard.has(10))


def test_cross_entropies_equal_those_of_all_logits() -> None:
    import torch
    from torch.nn.functional import cross_entropy

    logits, targets, weights = numbers()
    logits.requires_grad_()
    expected = cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    answers = Ranks(3).run(of_part, 3)
    for losses, _, beside, _ in answers:
        torch.testing.assert_close(torch.from_numpy(losses), expected.detach())
        assert torch.equal(torch.from_numpy(beside), logits.detach()[:, [0, 1, 4, 5, 8, 9]])
    gradient = torch.cat([torch.from_numpy(each) for _, each, _, _ in answers], -1)
    torch.testing.assert_close(gradient, logits.grad)
    assert [facts for _, _, _, facts in answers] == [(4, True, False), (4, False, False), (4, False, True)]
