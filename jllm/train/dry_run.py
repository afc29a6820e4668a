"""`--dry_run`: what a run would be, without starting it.

Prints the resolved options, the stage table with estimated memory, the pipeline's bubble, steps and tokens, and a
guess of the time where the device is known. Needs no launcher: without one, a run of one pipeline is assumed.
"""

import dataclasses
import json
import os

import torch
from deepspeed.accelerator import get_accelerator

from jllm.train import processes, setup
from jllm.train.batching import Parts
from jllm.train.config import TrainConfig, resolve_layout, weighted_folders
from jllm.train.data import epoch_steps, open_sets, share_of
from jllm.train.metrics import clock
from jllm.train.optim import warmup_steps
from jllm.train.throughput import peak_flops

TYPICAL_UTILISATION = 0.4
"""The share of the device's peak that the time guess assumes."""


def dry_run(config: TrainConfig) -> None:
    """Print the plan of a run, on the first process.

    Raises:
        UserError: the run could not start.
    """
    if processes.rank() != 0:
        return
    world_size = max(processes.world_size(), config.pipe_parallel_size)
    layout = resolve_layout(config, world_size)
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The threads that a process of the run would have: `--partition_method profile` times layers with them.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    model = setup.read_model_info(config)
    plan = setup.plan_stages(config, layout, setup.find_family(config))
    index, facts = open_sets(weighted_folders(config), config)
    share = share_of(config, layout, model, data_rank=0, data_size=layout.data)
    epochs = epoch_steps(config, index, share, Parts(rows=(facts.num_rows,), batch=(layout.global_batch,)))
    total_steps = config.max_steps or epochs.total(config.num_train_epochs)
    steps_per_epoch = epochs.counts[0]
    tokens = int((facts.tokens or 0) * total_steps / steps_per_epoch)
    rows_of_a_step = str(layout.global_batch) if share.budget is None else f"{facts.num_rows / steps_per_epoch:.1f}"
    print(json.dumps(dataclasses.asdict(config), indent=1, default=str))
    print(plan.table)
    print(
        f"{layout.pipe} stages x {layout.data} pipelines on {world_size} processes; {facts.num_rows:,} rows,"
        f" {rows_of_a_step} a step, {steps_per_epoch:,} steps an epoch, {total_steps:,} steps"
        f" ({warmup_steps(config, total_steps)} of warm-up)"
    )
    print(f"about {tokens:,} tokens" if tokens else "the data set has no manifest: tokens unknown")
    peak = peak_flops()
    if peak is None or not tokens:
        print("time: unknown on this device")
    else:
        seconds = tokens * plan.flops_per_token / (peak * TYPICAL_UTILISATION * world_size)
        print(f"time: about {clock(seconds)} at {TYPICAL_UTILISATION:.0%} of the devices' peak")
