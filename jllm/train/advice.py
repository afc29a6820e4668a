"""What a run is told about its own shape before it starts: stages that wait, micro-batches that stay half empty.

Each warning names the options and values that would help, and they are computed: `--partition_method` and
`--pipe_parallel_size` by splitting the model anew, `--gradient_accumulation_steps` by the length of the bubble,
`--batch_size_tokens` by grouping the data's own rows. What needs more memory than the device has is not named.

Cost: nothing where all is well; else a few splits of the model, under a second each for 64 stages.
"""

from collections.abc import Iterator

from transformers import PretrainedConfig

from jllm.models.pipeline.costs import Costs
from jllm.models.pipeline.partition import bubble_share, fullest_stage, imbalance, partition
from jllm.train.config import TrainConfig
from jllm.train.data.batching import EpochSteps
from jllm.train.data.open import POOR_FILLING
from jllm.train.shape import RunShape

LARGE_IMBALANCE, LARGE_BUBBLE = 0.25, 0.25
"""Above them, how far the slowest stage is over the mean, and the bubble's share of a step, are warned about."""
WORTH_IT = 0.95
"""A split is named where its slowest stage needs at most this share of the time."""


class PipelineAdvice:
    """What would make the pipeline of a run wait less.

    Args:
        config: the options.
        shape: the processes and batches.
        family: the model's configuration.
        costs: of its layers.
        boundaries: of the stages, as they are.
        memory_limit: bytes of a device; None where it is not known.
    """

    def __init__(
        self,
        config: TrainConfig,
        shape: RunShape,
        family: PretrainedConfig,
        costs: Costs,
        boundaries: list[int],
        *,
        memory_limit: float | None,
    ) -> None:
        self._config, self._shape, self._family, self._costs = config, shape, family, costs
        self._boundaries, self._memory_limit = boundaries, memory_limit
        self._method = "profile" if costs.is_measured else "fast"

    def warnings(self) -> tuple[str, ...]:
        """A line for each thing that makes stages wait; none for a single stage."""
        return tuple(line for line in (self._uneven(), self._bubble()) if line is not None)

    def _uneven(self) -> str | None:
        over = imbalance(self._costs, self._boundaries)
        if over <= LARGE_IMBALANCE:
            return None
        ways, stages = [], self._shape.mesh.pipe
        if self._config.partition_method != self._method:
            best = self._split(stages, self._shape.accumulation)
            gain = (1 + imbalance(self._costs, best)) / (1 + over)
            if gain <= WORTH_IT and self._fits(best, self._shape.accumulation):
                ways.append(f"--partition_method {self._method} ({_over(imbalance(self._costs, best))})")
        for fewer, accumulation, where in self._fewer_stages():
            split = self._split(fewer, accumulation)
            if imbalance(self._costs, split) <= LARGE_IMBALANCE and self._fits(split, accumulation):
                method = "" if self._config.partition_method == self._method else f" --partition_method {self._method}"
                after = _over(imbalance(self._costs, split)) if fewer > 1 else "no pipeline"
                ways.append(f"--pipe_parallel_size {fewer}{method}{where} ({after})")
                break
        return (
            f"warning: the slowest of {stages} stages takes {over:.0%} longer than the mean, and the others wait for"
            f" it; {_give(ways)}"
        )

    def _bubble(self) -> str | None:
        stages, accumulation = self._shape.mesh.pipe, self._shape.accumulation
        share = bubble_share(stages, accumulation)
        if share <= LARGE_BUBBLE:
            return None
        ways = [*self._more_micro_batches()]
        for fewer, left, where in self._fewer_stages():
            if bubble_share(fewer, left) <= LARGE_BUBBLE and self._fits(self._split(fewer, left), left):
                ways.append(f"--pipe_parallel_size {fewer}{where} ({bubble_share(fewer, left):.0%})")
                break
        return (
            f"warning: a step of {accumulation} micro-batches in {stages} stages is {share:.0%} bubble, in which stages"
            f" wait for the pipeline to fill and drain; {_give(ways)}"
        )

    def _more_micro_batches(self) -> Iterator[str]:
        """Options with which a step has as many micro-batches as a small bubble needs."""
        shape, by_rows = self._shape, self._config.batch_size_tokens is None
        needed = micro_batches_needed(shape.mesh.pipe)
        share = f"{bubble_share(shape.mesh.pipe, needed):.0%}"
        rows = shape.micro_batch * shape.accumulation
        smaller = [size for size in range(1, shape.micro_batch) if rows % size == 0 and rows // size >= needed]
        if by_rows and smaller:
            micro_batch = max(smaller)
            keeps = f" --gradient_accumulation_steps {rows // micro_batch}"
            if self._config.global_batch_size is not None:
                keeps = ""
            after = f"{bubble_share(shape.mesh.pipe, rows // micro_batch):.0%}"
            yield f"--per_device_train_batch_size {micro_batch}{keeps} ({after}, a step has the same rows)"
        if self._config.global_batch_size is not None:
            yield f"--global_batch_size {needed * shape.micro_batch * shape.mesh.data} ({share})"
        else:
            more = f", a step has {needed * shape.micro_batch * shape.mesh.data} rows" if by_rows else ""
            yield f"--gradient_accumulation_steps {needed} ({share}{more})"

    def _fewer_stages(self) -> Iterator[tuple[int, int, str]]:
        """Smaller numbers of stages, the largest first, with the micro-batches of a step that each pipeline then has,
        and on how many processes: those into which the same processes go come before those that need fewer."""
        mesh = self._shape.mesh
        of_a_stage = mesh.sequence * mesh.tensor  # these stay as they are
        whole_stages = mesh.world_size // of_a_stage
        for fewer in range(mesh.pipe - 1, 0, -1):
            if whole_stages % fewer:
                continue
            if self._config.global_batch_size is None:
                yield fewer, self._shape.accumulation, ""
                continue
            together = self._shape.micro_batch * (whole_stages // fewer)
            accumulation, rest = divmod(self._config.global_batch_size, together)
            if accumulation and not rest:
                yield fewer, accumulation, ""
        for fewer in range(mesh.pipe - 1, 0, -1):
            yield fewer, self._shape.accumulation, f" on {fewer * mesh.data * of_a_stage} processes"

    def _split(self, stages: int, accumulation: int) -> list[int]:
        method = "fast" if stages == 1 else self._method
        return partition(
            method,
            config=self._family,
            num_stages=stages,
            micro_batches=accumulation,
            costs=self._costs,
            overlaps=self._config.overlaps,
        )

    def _fits(self, boundaries: list[int], accumulation: int) -> bool:
        if self._memory_limit is None:
            return True
        fullest = fullest_stage(self._costs, boundaries, micro_batches=accumulation, overlaps=self._config.overlaps)
        return fullest <= self._memory_limit


def micro_batches_needed(stages: int) -> int:
    """The fewest micro-batches of a step with which the bubble is at most `LARGE_BUBBLE`."""
    needed = 1
    while bubble_share(stages, needed) > LARGE_BUBBLE:
        needed += 1
    return needed


def filling_lines(config: TrainConfig, epochs: EpochSteps) -> list[str]:
    """How full the micro-batches of `--batch_size_tokens` are, for people; nothing without it."""
    if epochs.filling is None:
        return []
    filled, half_empty = epochs.filling.filled, epochs.filling.half_empty
    said = f"micro-batches of {config.batch_size_tokens:,} tokens are {filled:.0%} full"
    said += f", {half_empty:.0%} of them less than half"
    if filled >= POOR_FILLING:
        return [said]
    ways = [f"--batch_size_tokens {epochs.larger}"] if epochs.larger is not None else []
    if not config.block_mask:
        ways.append("--block_mask, with which rows are joined (documents then do not attend to each other)")
    return [f"warning: {said}; {_give(ways)}"]


def _give(ways: list[str]) -> str:
    return f"give {', or '.join(ways)}" if ways else "no split of this model with these processes is better"


def _over(imbalance_left: float) -> str:
    return f"{imbalance_left:.0%} over the mean"
