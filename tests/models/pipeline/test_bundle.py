"""Planes are known by name on every stage, travel as one tensor without a copy, and reach the objective."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from jllm.models.pipeline.bundle import INPUT_IDS, LABELS, POSITION_IDS, READ, Bundle, Planes
from jllm.models.pipeline.head import Head
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.loading import load_stage
from tests.models.chain import chained_loss_and_gradients, packed_batch
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

torch.set_num_threads(1)


def test_planes_are_views_by_name() -> None:
    stacked = torch.arange(12).view(2, 2, 3)
    planes = Planes(READ, stacked)
    assert dict(planes).keys() == {LABELS, POSITION_IDS}
    assert planes[POSITION_IDS].tolist() == stacked[1].tolist()
    assert planes[POSITION_IDS].untyped_storage().data_ptr() == stacked.untyped_storage().data_ptr()
    with pytest.raises(KeyError, match="documents"):
        planes["documents"]
    more = planes.with_plane("documents", torch.ones(2, 3, dtype=torch.int64))
    assert list(more) == [*READ, "documents"]
    assert more["documents"].sum() == 6
    assert [more[name].equal(planes[name]) for name in READ] == [True, True]


def test_a_bundle_is_sent_without_a_copy() -> None:
    hidden, stacked = torch.zeros(2, 3, 8), torch.zeros(2, 2, 3, dtype=torch.int64)
    sent = Bundle(hidden, Planes(READ, stacked)).sent
    assert sent[0] is hidden
    assert sent[1] is stacked
    received = Bundle.received(sent, READ)
    assert received.hidden is hidden
    assert received.planes.stacked is stacked


class Recorder:
    """An objective that keeps the planes it is given."""

    planes: Mapping[str, Tensor]

    def __call__(self, hidden: Tensor, head: Head, fields: Mapping[str, Tensor]) -> Tensor:
        self.planes = dict(fields)
        return head(hidden).float().sum()


@pytest.mark.parametrize(("family", "needs_ids"), [("llama", False), ("deepseek_v4", True)])
def test_planes_reach_the_objective_by_name(family: str, needs_ids: bool, tmp_path: Path) -> None:
    """Also a plane that no stage knows, read behind the others; where layers look at the ids, these come last."""
    make_folder(tiny_config(family), tmp_path)
    ids, planes = packed_batch(96, packed=False)
    extra = torch.randint(0, 9, ids.shape)
    recorder = Recorder()
    read = (*READ, "documents")
    stages = [
        PipelineStage(load_stage(tmp_path, span, dtype=torch.float32), span, recorder, read=read)
        for span in spans_of([0, 1, 3, 4])
    ]
    beyond = (*read, INPUT_IDS) if needs_ids else read
    assert [stage.receives for stage in stages] == [read, beyond, beyond]
    chained_loss_and_gradients(stages, ids, torch.cat([planes, extra[None]]))
    assert tuple(recorder.planes) == beyond
    expected = {LABELS: planes[0], POSITION_IDS: planes[1], "documents": extra, INPUT_IDS: ids}
    for name, plane in recorder.planes.items():
        assert plane.equal(expected[name]), name
