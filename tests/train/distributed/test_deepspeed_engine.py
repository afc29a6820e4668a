"""What the engine leaves out; what it computes, runs of several processes show (tests/distributed)."""

from collections.abc import Iterator

import pytest
import torch
from deepspeed import comm

from jllm.train.distributed.deepspeed_engine import TrainingEngine


@pytest.fixture
def group() -> Iterator[torch.distributed.ProcessGroup]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    comm.init_distributed("gloo", auto_mpi_discovery=False)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_gradients_of_one_pipeline_stay_where_they_are(
    group: torch.distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are copied to be summed where there are several, and not at all where there is one."""
    engine = TrainingEngine.__new__(TrainingEngine)
    gradients = [torch.randn(3), torch.randn(2, 2)]
    copied: list[object] = []

    def summed(bucket: list[torch.Tensor], *about: object) -> torch.Tensor:
        copied.append(about)
        return torch.cat([each.flatten() for each in bucket]) / 2

    monkeypatch.setattr(TrainingEngine, "allreduce_bucket", lambda self, *given: summed(*given))
    monkeypatch.setattr(
        TrainingEngine, "unflatten", lambda self, flat, like: [flat[:3], flat[3:].view(2, 2)], raising=False
    )
    before = [each.clone() for each in gradients]
    engine.allreduce_and_copy(gradients, group)
    engine.allreduce_and_copy(gradients, group, 1)
    assert not copied
    assert all(torch.equal(found, old) for found, old in zip(gradients, before, strict=True))
    engine.allreduce_and_copy(gradients, group, 2)
    assert len(copied) == 1
    assert all(torch.equal(found, old / 2) for found, old in zip(gradients, before, strict=True))
