"""The overlapped schedule: every pass once, in order, nobody waits for ever, and no more in flight than is said."""

from collections import deque
from typing import Any

import pytest
import torch
from deepspeed.runtime.pipe import schedule
from hypothesis import given
from hypothesis import strategies as st

from jllm.models.pipeline.partition import micro_batches_in_flight
from jllm.parallel.mesh import Mesh
from jllm.train.distributed.overlapped import OverlappedSchedule, Transfers
from tests.distributed.ranks import Ranks

SIZES = st.tuples(st.integers(1, 7), st.integers(1, 12))


def instructions(stages: int, micro_batches: int) -> list[list[Any]]:
    """Of each stage, in order."""
    return [
        [
            each
            for step in OverlappedSchedule(micro_batches=micro_batches, stages=stages, stage_id=stage)
            for each in step
        ]
        for stage in range(stages)
    ]


@given(SIZES)
def test_every_stage_passes_each_micro_batch_in_order(sizes: tuple[int, int]) -> None:
    stages, micro_batches = sizes
    for stage, found in enumerate(instructions(stages, micro_batches)):
        held: dict[int, int] = {}
        forward = backward = most = 0
        for each in found:
            if isinstance(each, schedule.ForwardPass):
                assert each.buffer_id not in held, "a buffer is given away before its backward pass"
                held[each.buffer_id], forward = forward, forward + 1
            elif isinstance(each, schedule.BackwardPass):
                assert held.pop(each.buffer_id) == backward
                backward += 1
            most = max(most, len(held))
        assert forward == backward == micro_batches
        assert most == micro_batches_in_flight(stage, stages, micro_batches, overlaps=True)
        assert [type(each).__name__ for each in found[-3:]] == ["ReduceTiedGrads", "ReduceGrads", "OptimizerStep"]


@given(SIZES)
def test_what_is_received_was_sent_and_nobody_waits_for_ever(sizes: tuple[int, int]) -> None:
    stages, micro_batches = sizes
    left = [deque(each) for each in instructions(stages, micro_batches)]
    activations, gradients = ([0] * (stages + 1) for _ in range(2))
    moved = True
    while moved:
        moved = False
        for stage, queue in enumerate(left):
            while queue:
                now = queue[0]
                if isinstance(now, schedule.RecvActivation):
                    if not activations[stage]:
                        break
                    activations[stage] -= 1
                elif isinstance(now, schedule.RecvGrad):
                    if not gradients[stage]:
                        break
                    gradients[stage] -= 1
                elif isinstance(now, schedule.SendActivation):
                    activations[stage + 1] += 1
                elif isinstance(now, schedule.SendGrad):
                    gradients[stage - 1] += 1
                queue.popleft()
                moved = True
    assert not any(left), "a receive that nobody answers"
    assert not any(activations)
    assert not any(gradients)


def test_steps_on_slow_links_take_as_long_as_their_passes() -> None:
    """By a clock of the schedule: passes of 1 and 2, a transfer of 1: what 1F1B waits for is not waited for."""

    def seconds(kind: type[Any], stages: int, micro_batches: int, transfer: float) -> float:
        streams = [list(kind(micro_batches=micro_batches, stages=stages, stage_id=stage)) for stage in range(stages)]
        queues = [deque(each for step in steps for each in step) for steps in streams]
        clock = [0.0] * stages
        arrivals: dict[tuple[str, int], deque[float]] = {}
        while any(queues):
            for stage, queue in enumerate(queues):
                while queue:
                    now = queue[0]
                    name = type(now).__name__
                    if name.startswith("Recv"):
                        waiting = arrivals.setdefault((name[4:], stage), deque())
                        if not waiting:
                            break
                        clock[stage] = max(clock[stage], waiting.popleft())
                    elif name.startswith("Send"):
                        to = stage + (1 if name == "SendActivation" else -1)
                        arrivals.setdefault((name[4:], to), deque()).append(clock[stage] + transfer)
                    clock[stage] += {"ForwardPass": 1.0, "BackwardPass": 2.0}.get(name, 0.0)
                    queue.popleft()
        return max(clock)

    for stages in (2, 4):
        micro_batches = 8 * stages
        ideal = 3.0 * (micro_batches + stages - 1)
        assert seconds(OverlappedSchedule, stages, micro_batches, 0.0) == ideal
        # The first micro-batch's way there and back is all that is left to wait for.
        assert seconds(OverlappedSchedule, stages, micro_batches, 1.0) == ideal + 2 * (stages - 1)
        assert seconds(schedule.TrainSchedule, stages, micro_batches, 1.0) > ideal + micro_batches


def most_held(micro_batches: int, ahead: int) -> int:
    """How many activations a first stage ever holds that it has sent."""
    from torch import distributed as dist

    dist.init_process_group("gloo")
    place = Mesh(pipe=2, data=1).place(dist.get_rank())
    transfers, like, most = Transfers(place), torch.zeros(5), 0
    for _ in range(2):
        transfers.begin(micro_batches)
        if place.pipe:
            for number in range(micro_batches):
                [found] = transfers.receive_activation((like,))
                assert found.tolist() == [number] * 5
                transfers.send_gradient(found)
        else:
            for number in range(micro_batches + ahead):
                if number < micro_batches:
                    transfers.send_activation((like + number,))
                if number >= ahead:
                    assert transfers.receive_gradient(like).tolist() == [number - ahead] * 5
                most = max(most, len(transfers._sent["activations"]))
        transfers.end()
        assert not any(transfers._sent.values())
    return most


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_was_sent_is_held_until_it_is_answered(ahead: int) -> None:
    most, none = Ranks(2).run(most_held, 20, ahead)
    assert none == 0
    assert most <= ahead + 2
