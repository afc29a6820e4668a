"""Time stamps for one step (`--trace_step`): every instruction of DeepSpeed's pipeline schedule, on all processes.

The engine finds the methods of its instructions in a table; while a step is traced this process's engine has a table
of its own, whose methods take the time. Nothing is changed, and nothing costs anything, in other steps. On CUDA the
stamps are events of the device, so nothing waits for it before the step is over; elsewhere they are the clock's.

The clocks of processes are compared before the step: all of them leave a barrier at nearly the same moment, several
times, and the median difference counts. Cost: `ROUNDS` barriers, and one message with all spans.
"""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe import schedule

from jllm.parallel.collectives import Collectives
from jllm.train.config import TrainConfig
from jllm.train.distributed.deepspeed_engine import TrainingEngine
from jllm.train.records import trace
from jllm.train.records.metrics import Recorder
from jllm.train.records.trace import ProcessTrace, Span, Trace

ROUNDS = 21
KINDS = {
    schedule.ForwardPass: trace.FORWARD,
    schedule.BackwardPass: trace.BACKWARD,
    schedule.SendActivation: trace.SEND_ACTIVATION,
    schedule.RecvActivation: trace.RECEIVE_ACTIVATION,
    schedule.SendGrad: trace.SEND_GRADIENT,
    schedule.RecvGrad: trace.RECEIVE_GRADIENT,
    schedule.LoadMicroBatch: trace.LOAD,
    schedule.ReduceTiedGrads: trace.REDUCE,
    schedule.ReduceGrads: trace.REDUCE,
    schedule.OptimizerStep: trace.OPTIMIZER,
}
_OF_THE_STEP = (trace.REDUCE, trace.OPTIMIZER)
Stamp = Callable[[], float]
"""Gives seconds of this process's clock; to be asked when the step is over."""


class StepTrace:
    """What this process does in a step.

    Args:
        engine: of this process.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._marks: list[tuple[str, Stamp, Stamp]] = []
        self._stamp = _device_stamps() if get_accelerator().device_name() == "cuda" else _clock_stamp

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take the time of every instruction meanwhile."""
        table = type(self._engine)._INSTRUCTION_MAP
        self._engine._INSTRUCTION_MAP = {  # type: ignore[misc]
            instruction: self._timed(KINDS[instruction], method) for instruction, method in table.items()
        }
        try:
            yield
        finally:
            del self._engine._INSTRUCTION_MAP  # the class's counts again

    def _timed(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def run(engine: TrainingEngine, *arguments: Any, **named: Any) -> Any:
            began = self._stamp()
            result = method(engine, *arguments, **named)
            self._marks.append((kind, began, self._stamp()))
            return result

        return run

    def gathered(self, collectives: Collectives, offsets: tuple[list[float], float], step: int) -> Trace:
        """What all processes did; every process calls it.

        Args:
            collectives: the processes.
            offsets: of `clock_offsets`.
            step: its number.
        """
        counts: Counter[str] = Counter()
        mine = []
        for kind, start, end in self._marks:
            number = None if kind in _OF_THE_STEP else counts[kind]
            counts[kind] += 1
            mine.append((kind, start(), end(), number))
        everyone = collectives.gather(mine)
        early, error = offsets
        zero = min(start - early[rank] for rank, marks in enumerate(everyone) for _, start, _, _ in marks)
        processes = []
        for rank, marks in enumerate(everyone):
            place, late = collectives.mesh.place(rank), early[rank] + zero
            spans = [
                Span(kind=kind, start=start - late, end=end - late, micro_batch=number)
                for kind, start, end, number in marks
            ]
            where = {"stage": place.pipe, "pipeline": place.data, "slice": place.tensor, "run": place.sequence}
            processes.append(ProcessTrace(spans=tuple(spans), **where))
        return Trace(step=step, clock_error=error, processes=tuple(processes))


@contextlib.contextmanager
def traced_step(
    engine: TrainingEngine, collectives: Collectives, config: TrainConfig, step: int, recorder: Recorder
) -> Iterator[None]:
    """Trace what is done meanwhile, if that is step `--trace_step`, and write it beside the records.

    Every process calls it. A disk that is full then is a warning.
    """
    folder = config.resolved_log_dir
    if step != config.trace_step or folder is None:
        yield
        return
    offsets = clock_offsets(collectives)
    watched = StepTrace(engine)
    with watched.watching():
        yield
    found = watched.gathered(collectives, offsets, step)
    if collectives.place.is_first:
        try:
            path = found.write(folder)
        except OSError as error:
            recorder.warn(f"the trace of step {step} could not be written: {error.strerror}")
        else:
            recorder.event("trace", f"wrote {path}", step=step, file=str(path))


def clock_offsets(collectives: Collectives) -> tuple[list[float], float]:
    """By how many seconds the clock of each process is ahead of the first one's, and how far that may be off."""
    mine = []
    for _ in range(ROUNDS):
        collectives.barrier()
        mine.append(time.perf_counter())
    first, *_ = everyone = collectives.gather(mine)
    ahead = [[time - zero for time, zero in zip(times, first, strict=True)] for times in everyone]
    offsets = [statistics.median(each) for each in ahead]
    spread = [
        statistics.median(abs(each - offset) for each in times) for times, offset in zip(ahead, offsets, strict=True)
    ]
    return offsets, max(spread)


def _clock_stamp() -> Stamp:
    now = time.perf_counter()
    return lambda: now


def _device_stamps() -> Callable[[], Stamp]:
    """Stamps of the device's current stream, in seconds of this process's clock."""
    first = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    torch.cuda.synchronize()
    zero = time.perf_counter()

    def stamp() -> Stamp:
        event = torch.cuda.Event(enable_timing=True)
        event.record()

        def seconds() -> float:
            event.synchronize()
            return float(zero + first.elapsed_time(event) / 1000)

        return seconds

    return stamp
