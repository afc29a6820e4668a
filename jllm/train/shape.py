"""How a run's processes and batches are divided, and the values that options get by that."""

import dataclasses
from typing import Any

from jllm.errors import UserError
from jllm.parallel.mesh import BY_STAGE, ORDER, Mesh
from jllm.train.config import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunShape:
    """How a run's processes and batches are divided.

    Attributes:
        mesh: the processes.
        micro_batch: rows of a micro-batch.
        accumulation: micro-batches of a step, for one pipeline.
    """

    mesh: Mesh
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Rows of a step over all pipelines."""
        return self.micro_batch * self.accumulation * self.mesh.data

    @property
    def processes(self) -> str:
        """How the processes are divided, for people."""
        mesh = self.mesh
        runs = f" x {mesh.sequence} runs of tokens" if mesh.sequence > 1 else ""
        slices = f" x {mesh.tensor} slices" if mesh.tensor > 1 else ""
        return f"{mesh.pipe} stages{runs}{slices} x {mesh.data} pipelines"


def resolve_shape(config: TrainConfig, world_size: int) -> RunShape:
    """Divide `world_size` processes and the batch.

    Raises:
        UserError: sizes that do not divide.
    """
    micro_batch = config.per_device_train_batch_size
    sizes_of = {
        "pipe_parallel_size": config.pipe_parallel_size,
        "sequence_parallel_size": config.sequence_parallel_size,
        "model_parallel_size": config.model_parallel_size,
    }
    pipe, sequence, tensor = sizes_of.values()
    order = ORDER if config.column_major_topology else BY_STAGE
    mesh = Mesh.over(world_size, pipe=pipe, sequence=sequence, tensor=tensor, order=order)
    if mesh is None:
        several = [f"--{name} {size}" for name, size in sizes_of.items() if size > 1 or name == "pipe_parallel_size"]
        sizes = " x ".join(several) + (f" = {pipe * sequence * tensor}" if len(several) > 1 else "")
        raise UserError(
            f"{sizes} does not divide the {world_size} processes of this run;"
            f" give a divisor of {world_size}, or start another number of processes (deepspeed --num_gpus)"
        )
    together = micro_batch * mesh.data
    accumulation = config.gradient_accumulation_steps or 1
    if config.global_batch_size is not None:
        accumulation, rest = divmod(config.global_batch_size, together)
        if rest or not accumulation:
            raise UserError(
                f"--global_batch_size {config.global_batch_size} is not a multiple of --per_device_train_batch_size"
                f" {micro_batch} x {mesh.data} data-parallel pipelines = {together}; give a multiple of it"
            )
    return RunShape(mesh=mesh, micro_batch=micro_batch, accumulation=accumulation)


def automatic_options(config: TrainConfig, shape: RunShape) -> dict[str, Any]:
    """The values, as JSON has them, that options get which are not given and follow from the others."""
    by_rows = config.batch_size_tokens is None
    log_dir = config.resolved_log_dir
    values = {
        "zero_stage": config.resolved_zero_stage,
        "gradient_accumulation_steps": shape.accumulation,
        "global_batch_size": shape.global_batch if by_rows else None,
        "log_dir": None if log_dir is None else str(log_dir),
    }
    return {name: value for name, value in values.items() if getattr(config, name) is None and value is not None}
