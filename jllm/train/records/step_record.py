"""The record of a training step, as `metrics.jsonl` has it."""

from typing import Any

from jllm.train.distributed.agreement import StepFacts
from jllm.train.records.throughput import utilisation


def record_of_step(
    facts: StepFacts,
    *,
    step: int,
    loss: float | None,
    norm: float | None,
    rate: float,
    seconds: float,
    rows_of_epoch: int,
    flops_per_token: float,
    world_size: int,
) -> dict[str, Any]:
    """All that one step says of itself.

    Args:
        facts: the step, as every process knows it.
        step: its number, from 1.
        loss, norm: None where nothing was trained on.
        rate: the learning rate.
        seconds: that it took, its data included.
        rows_of_epoch: of the data set.
        flops_per_token: operations of a forward and a backward pass of the whole model.
        world_size: processes of the run.
    """
    speed = facts.tokens / seconds
    return {
        "step": step,
        "epoch": facts.epoch + facts.rows_after / rows_of_epoch,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens": facts.tokens,
        "trained_tokens": facts.trained_tokens,
        "filled": facts.tokens / facts.room,
        "tokens_per_second": speed,
        "mfu": utilisation(speed, flops_per_token, world_size),
        "data_wait": facts.waited / seconds,
        "seconds": seconds,
        **facts.devices.record(),
    }
