"""Traces of steps that never were: stages that take the time they are told, and start as early as they can."""

from jllm.train.records import trace
from jllm.train.records.trace import ProcessTrace, Span, Trace


def step_of(
    *, stages: int, micro_batches: int, pipelines: int = 1, forward: tuple[float, ...] = (1.0,), transfer: float = 0.0
) -> Trace:
    """A step in the order of one forward, one backward.

    Args:
        forward: seconds of a forward pass of each stage, or of all; a backward pass takes twice as long.
        transfer: seconds of a transfer, for which sender and receiver stand still.
    """
    times = forward * stages if len(forward) == 1 else forward
    orders = [_order(stage, stages, micro_batches) for stage in range(stages)]
    clock = [0.0] * stages
    spans: list[list[Span]] = [[] for _ in range(stages)]
    done: dict[tuple[str, int, int], float] = {}
    places = [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage in range(stages):
            while places[stage] < len(orders[stage]):
                kind, number = orders[stage][places[stage]]
                source = stage - 1 if kind == trace.FORWARD else stage + 1
                if 0 <= source < stages and (kind, source, number) not in done:
                    break
                if 0 <= source < stages:
                    receive = trace.RECEIVE_ACTIVATION if kind == trace.FORWARD else trace.RECEIVE_GRADIENT
                    end = max(clock[stage], done[kind, source, number]) + transfer
                    spans[stage].append(Span(kind=receive, start=clock[stage], end=end, micro_batch=number))
                    clock[stage] = end
                seconds = times[stage] * (1 if kind == trace.FORWARD else 2)
                end = clock[stage] + seconds
                spans[stage].append(Span(kind=kind, start=clock[stage], end=end, micro_batch=number))
                clock[stage] = done[kind, stage, number] = end
                target = stage + 1 if kind == trace.FORWARD else stage - 1
                if 0 <= target < stages:
                    send = trace.SEND_ACTIVATION if kind == trace.FORWARD else trace.SEND_GRADIENT
                    spans[stage].append(Span(kind=send, start=end, end=end + transfer, micro_batch=number))
                    clock[stage] = end + transfer
                places[stage] += 1
    processes = [
        ProcessTrace(stage=stage, pipeline=pipeline, spans=tuple(spans[stage]))
        for pipeline in range(pipelines)
        for stage in range(stages)
    ]
    return Trace(step=5, clock_error=1e-4, processes=tuple(processes))


def _order(stage: int, stages: int, micro_batches: int) -> list[tuple[str, int]]:
    ahead = min(stages - stage, micro_batches)
    order = [(trace.FORWARD, number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append((trace.BACKWARD, number))
        if number + ahead < micro_batches:
            order.append((trace.FORWARD, number + ahead))
    return order
