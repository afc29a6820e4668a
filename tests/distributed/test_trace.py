"""`--trace_step`: one step of a real run, with all that every stage did, on one clock; other steps as they are.

`--profile_step` beside it: what the stages of the first pipeline ran.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from jllm.train.records import trace
from jllm.train.records.curves import plot
from jllm.train.records.timeline import timeline_of
from jllm.train.records.trace import read_trace
from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records, train_rank
from tests.fixtures import model_and_data

MICRO_BATCHES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_and_data(tmp_path_factory.mktemp("trace"), tied=True, rows=48)


def test_a_step_of_two_pipelines(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    for name, more in (("plain", {}), ("traced", {"trace_step": 2, "profile_step": 3})):
        options = logged_options(folder, tmp_path / name, max_steps=3, **more)
        assert ranks(4).run(train_rank, options) == [None] * 4
    logs = [tmp_path / name / "log" for name in ("plain", "traced")]
    assert [r["loss"] for r in records(logs[0])] == [r["loss"] for r in records(logs[1])]
    assert [path.name for path in logs[1].glob("trace*")] == ["trace-step-2.json"]
    assert not [*logs[0].glob("trace*"), *logs[0].glob("profile*")]
    profiles = sorted(logs[1].glob("profile*"))
    assert [path.name for path in profiles] == [f"profile-step-3-rank-{rank}.txt" for rank in range(2)]
    for stage, path in enumerate(profiles):
        assert path.read_text().startswith(f"step 3, stage {stage}: ")
        assert "aten::" in path.read_text()
    [event] = [each for each in records(logs[1], "event") if each["event"] == "trace"]
    assert event["step"] == 2
    found = read_trace(logs[1] / "trace-step-2.json")
    assert [(each.stage, each.pipeline) for each in sorted(found.processes, key=lambda p: (p.pipeline, p.stage))] == [
        (stage, pipeline) for pipeline in range(2) for stage in range(2)
    ]
    for process in found.processes:
        for earlier, later in zip(process.spans, process.spans[1:], strict=False):
            assert earlier.start <= earlier.end <= later.start
        for kind in (trace.FORWARD, trace.BACKWARD, trace.LOAD):
            numbers = [span.micro_batch for span in process.spans if span.kind == kind]
            assert numbers == list(range(MICRO_BATCHES))
        sends = trace.SEND_ACTIVATION if process.stage == 0 else trace.SEND_GRADIENT
        assert len([span for span in process.spans if span.kind == sends]) == MICRO_BATCHES
        assert [span.kind for span in process.spans][-1] == trace.OPTIMIZER
    seconds = max(span.end for process in found.processes for span in process.spans)
    assert 0 < seconds < records(logs[1])[1]["seconds"]
    # What one stage has received it had not before the other one sent it, give or take the clocks.
    for pipeline in found.pipelines:
        first, last = found.pipeline(pipeline)
        for number in range(MICRO_BATCHES):
            [sent] = [s for s in first.spans if (s.kind, s.micro_batch) == (trace.SEND_ACTIVATION, number)]
            [got] = [s for s in last.spans if (s.kind, s.micro_batch) == (trace.RECEIVE_ACTIVATION, number)]
            assert got.end >= sent.start - 10 * found.clock_error - 1e-3
    timeline = timeline_of(found)
    assert len(timeline.rows) == 4
    assert timeline.ideal_seconds > 0
    page = plot([tmp_path / "traced"]).read_text()
    assert "ideal schedule" in page
    assert "<h2>step 2</h2>" in page


def test_slices_and_shared_rows(ranks: Callable[[int], Ranks], folder: Path, tmp_path: Path) -> None:
    """Each process has a row of the timeline, and a profile."""
    sizes = {"pipe_parallel_size": 1, "model_parallel_size": 2, "sequence_parallel_size": 2}
    options = logged_options(folder, tmp_path, max_steps=2, trace_step=1, profile_step=2, **sizes)
    assert ranks(4).run(train_rank, options) == [None] * 4
    traced = read_trace(tmp_path / "log/trace-step-1.json")
    assert [(each.run, each.slice) for each in traced.processes] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    timeline = timeline_of(traced)
    assert [row.name for row in timeline.rows] == [
        f"stage 0, run {run}, slice {slice_}" for run in range(2) for slice_ in range(2)
    ]
    assert [row.name for row in timeline.ideal] == ["stage 0, ideal"]
    found = [(tmp_path / f"log/profile-step-2-rank-{rank}.txt").read_text() for rank in range(4)]
    assert [text.split(":")[0] for text in found] == [
        f"step 2, stage 0, slice {slice_}, run {run}" for run in range(2) for slice_ in range(2)
    ]
