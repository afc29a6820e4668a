"""Options of the trainer: how much data a step takes, and how many there are."""

import dataclasses

from jllm.options import option
from jllm.train.limits import MOST_ROWS, MOST_STEPS


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepsOptions:
    """How much data a step takes, and how many there are."""

    per_device_train_batch_size: int = option(
        1, "--micro_batch_size", least=1, most=MOST_ROWS, group="Steps", help="rows of a micro-batch"
    )
    batch_size_tokens: int | None = option(
        None,
        least=1,
        most=MOST_ROWS,
        help="tokens of a micro-batch, padding included: rows of a step are grouped by length, as many as fit",
    )
    gradient_accumulation_steps: int | None = option(
        None, least=1, most=MOST_ROWS, help="micro-batches of a step [default: 1]"
    )
    global_batch_size: int | None = option(
        None, least=1, most=MOST_ROWS, help="rows of a step over all processes, instead of the above"
    )
    num_train_epochs: int = option(
        1, most=1 << 20, help="passes over the data; 0: convert --from_ckpt to --output_dir only"
    )
    max_steps: int | None = option(
        None, least=1, most=MOST_STEPS, help="train exactly this many steps, over as many epochs as that takes"
    )
    time_limit: str | None = option(
        None,
        metavar="DURATION",
        help="save and leave, with exit code 75, before the process is this old: 23h50m or 23:50:00",
    )
