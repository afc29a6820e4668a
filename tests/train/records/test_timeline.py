"""Timelines: waiting is told from sending, and the ideal schedule is as long as the formula says."""

import dataclasses

import pytest

from jllm.train.records import trace
from jllm.train.records.timeline import COMMUNICATION, WAITING, duration, timeline_of
from tests.train.records.steps import step_of


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.0, 0.012344, 2.0)] == ["0.00 ms", "12.34 ms", "2.00 s"]


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 3), (2, 1), (2, 4), (3, 8), (4, 6), (4, 2)])
def test_even_stages_without_transfers_are_ideal(stages: int, micro_batches: int) -> None:
    found = timeline_of(step_of(stages=stages, micro_batches=micro_batches))
    expected = 3.0 * (micro_batches + stages - 1)
    assert found.ideal_seconds == pytest.approx(expected)
    assert found.seconds == pytest.approx(expected)
    for row in found.rows:
        assert row.share(trace.FORWARD, trace.BACKWARD, of=expected) == pytest.approx(3 * micro_batches / expected)
        assert row.share(COMMUNICATION, of=expected) == 0
    # A slow stage costs what it is slower by, once for each micro-batch; the ideal has the mean.
    slow = timeline_of(step_of(stages=stages, micro_batches=micro_batches, forward=(2.0,) + (1.0,) * (stages - 1)))
    assert slow.ideal_seconds == pytest.approx(expected * (stages + 1) / stages)
    assert slow.seconds >= slow.ideal_seconds - 1e-9


def test_waiting_is_what_lies_before_the_other_stage_sends() -> None:
    found = timeline_of(step_of(stages=2, micro_batches=2, transfer=0.25))
    second = found.rows[1]
    assert [bar.kind for bar in second.bars[:3]] == [WAITING, COMMUNICATION, trace.FORWARD]
    waiting, transfer, _ = second.bars[:3]
    assert (waiting.start, waiting.end, transfer.end) == (0.0, 1.0, 1.25)
    for row in found.rows:
        ends = [bar.end for bar in row.bars]
        assert all(bar.start >= end - 1e-9 for bar, end in zip(row.bars[1:], ends, strict=False))


def test_slices_wait_for_their_own_neighbours() -> None:
    """Beside the slices of another step: each has the bars of a step of its own."""
    quick, slow = (step_of(stages=2, micro_batches=2, forward=(each,), transfer=0.25) for each in (1.0, 3.0))
    later = tuple(dataclasses.replace(each, slice=1) for each in slow.processes)
    found = timeline_of(dataclasses.replace(quick, processes=(*quick.processes, *later)))
    both = [(stage, each) for stage in range(2) for each in range(2)]
    assert [row.name for row in found.rows] == [f"stage {stage}, slice {each}" for stage, each in both]
    apart = [timeline_of(each).rows for each in (quick, slow)]
    assert [row.bars for row in found.rows] == [apart[each][stage].bars for stage, each in both]
    assert [row.name for row in found.ideal] == ["stage 0, ideal", "stage 1, ideal"]
