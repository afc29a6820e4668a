"""Options of the trainer: what is written and told about a run."""

import dataclasses
from pathlib import Path

from jllm.options import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordsOptions:
    """What is written and told about a run."""

    log_dir: Path | None = option(
        None,
        group="Records",
        help="metrics.jsonl, TensorBoard, resolved options [default: inside --checkpoint or --output_dir]",
    )
    steps_per_print: int = option(1, least=1, help="steps between two lines on the console")
    report_to: str = option(
        "", help="services that get the numbers too, by commas: mlflow, trackio, wandb; each by its own package"
    )
    report_files: bool = option(False, help="give the files of checkpoints and model to --report_to, not their places")
    trace_step: int | None = option(
        None, least=1, help="record when each stage did what in this step, in trace-step-N.json beside metrics.jsonl"
    )
    profile_step: int | None = option(
        None,
        least=1,
        help="list the kernels that took most of this step, and where the device waited, in profile-step-N-rank-R.txt"
        " beside metrics.jsonl",
    )
