"""The scale of a step: the engine then gives the sum of all losses by the trained tokens."""

import pytest
import torch

from jllm.data.dataset.shards import IGNORE_INDEX
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse, step_scale
from tests.train.objectives.heads import (
    LinearHead,
    micro_batch,
    plain,
)


def test_scale_of_a_step() -> None:
    """Two micro-batches on three pipelines: their mean is the sum over all tokens by their number."""
    head = LinearHead(torch.float32)
    hidden, fields = micro_batch(torch.float32)
    trained = 6 * int((fields["labels"] != IGNORE_INDEX).sum())
    in_use = ObjectiveInUse(CrossEntropy())
    in_use.use(CrossEntropy(), scale=step_scale(terms=trained, micro_batches=2, data_parallel_size=3))
    assert in_use(hidden, head, fields).dtype == torch.float32
    mean = float(in_use(hidden, head, fields).detach())
    assert mean == pytest.approx(6 * float(plain(hidden, head, fields).detach()) / trained, rel=1e-6)
    assert step_scale(terms=0, micro_batches=2, data_parallel_size=3) == 6
