"""An evaluation over parts of the vocabulary counts what it counts over all of it."""

from typing import Any

from tests.distributed.ranks import Ranks

VOCABULARY, TOKENS = 11, 40


def logits_and_labels() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    # Few values, so that many logits of a token are equal.
    logits = torch.randint(-3, 4, (TOKENS, VOCABULARY), generator=generator).float()
    logits[5, 2] = float("-inf")
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[::7] = -100
    return logits, labels


def counted(size: int) -> list[Any]:
    import torch.distributed as dist

    from jllm.parallel.mesh import Mesh
    from jllm.parallel.tensor.group import TensorGroup
    from jllm.parallel.tensor.vocabulary import VocabularyShard
    from jllm.train.objectives.part_of_vocabulary import counted_of_part

    dist.init_process_group("gloo")
    shard = VocabularyShard.of(VOCABULARY, TensorGroup.make(Mesh(tensor=size), dist.get_rank()))
    logits, labels = logits_and_labels()
    # Blocks of three tokens.
    found = counted_of_part(logits[:, shard.start : shard.stop], labels, shard, 3 * shard.largest)
    return [each.tolist() for each in found]


def test_counts_are_those_of_all_logits() -> None:
    import pytest

    from jllm.train.objectives.cross_entropy import _counted

    logits, labels = logits_and_labels()
    loss, top5, losses, entropies = (each.tolist() for each in _counted(logits, labels))
    correct = int((logits.argmax(-1) == labels).sum())
    for answer in Ranks(4).run(counted, 4):
        assert answer[0] == pytest.approx(loss, rel=1e-6)
        assert answer[1:] == [correct, top5, losses, entropies]
