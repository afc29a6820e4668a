"""The record of a step: what devices do not say is left out, what they say is there for each stage."""

import pytest

from jllm.train.distributed.agreement import StepFacts
from jllm.train.lifecycle.requests import Request
from jllm.train.records.step_record import record_of_step
from jllm.train.records.throughput import DevicesUse, DeviceUse


@pytest.mark.parametrize("on_cuda", [False, True])
def test_what_devices_say(on_cuda: bool) -> None:
    more = {"reserved": 30, "retries": 2, "busy": 97} if on_cuda else {}
    used = [DeviceUse(memory=10, **more), DeviceUse(memory=20)]
    stages = [[each.numbers() for each in used], [used[0].numbers()] * 2]
    facts = StepFacts(
        waited=0.5,
        length=4,
        tokens=100,
        trained_tokens=90,
        rows=2,
        epoch=1,
        rows_before=3,
        request=Request.NOTHING,
        devices=DevicesUse.of(stages),
        room=200,
    )
    record = record_of_step(
        facts, step=7, loss=2.0, norm=1.0, rate=0.1, seconds=2.0, rows_of_epoch=10, flops_per_token=1.0, world_size=4
    )
    expected = {
        "step": 7,
        "epoch": 1.5,
        "loss": 2.0,
        "tokens_per_second": 50.0,
        "data_wait": 0.25,
        "seconds": 2.0,
        "filled": 0.5,
    }
    assert {key: record[key] for key in expected} == expected
    assert record["memory_mib"] == [20, 10]
    on_devices = {"reserved_mib": [30, 30], "alloc_retries": [2, 2], "device_busy": [97, 97]}
    assert {key: record[key] for key in on_devices if key in record} == (on_devices if on_cuda else {})
