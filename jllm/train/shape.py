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
        slices = f" x {self.mesh.tensor} slices" if self.mesh.tensor > 1 else ""
        return f"{self.mesh.pipe} stages{slices} x {self.mesh.data} pipelines"


def resolve_shape(config: TrainConfig, world_size: int) -> RunShape:
    """Divide `world_size` processes and the batch.

    Raises:
        UserError: sizes that do not divide.
    """
    pipe, tensor, micro_batch = (
        config.pipe_parallel_size,
        config.model_parallel_size,
        config.per_device_train_batch_size,
    )
    order = ORDER if config.column_major_topology else BY_STAGE
    mesh = Mesh.over(world_size, pipe=pipe, tensor=tensor, order=order)
    if mesh is None:
        sizes = f"--pipe_parallel_size {pipe}"
        if tensor > 1:
            sizes += f" x --model_parallel_size {tensor} = {pipe * tensor}"
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
