"""Options of the trainer: what a run writes, keeps and goes on from."""

import dataclasses
from pathlib import Path

from jllm.options import option
from jllm.train.limits import MOST_SECONDS

EXECUTORS = ("process", "thread", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointsOptions:
    """What a run writes, keeps and goes on from."""

    checkpoint: Path | None = option(None, group="Checkpoints", help="folder of checkpoints")
    clean: bool = option(
        False, "-C", help="start over: remove what earlier runs left in --checkpoint, --output_dir and --log_dir"
    )
    steps_per_checkpoint: int = option(0, help="steps between checkpoints; 0: at the end of each epoch")
    minutes_per_checkpoint: float = option(
        0.0, most=MOST_SECONDS, help="minutes after which a further checkpoint is written; 0: none"
    )
    ckpt_step_gt: int = option(0, help="write checkpoints only after steps greater than this")
    ckpt_epoch: str = option("", help='write checkpoints only in these epochs, counted from 1: "1,3"')
    skip_epoch: str = option("", help='write no checkpoints in these epochs, counted from 1: "2"')
    max_num_checkpoints: int = option(0, help="newest checkpoints to keep; 0: all")
    best_of: int = option(0, help="checkpoints to keep with the lowest evaluation loss, beside the newest; 0: none")
    only_ckpt_model: bool = option(False, help="checkpoints are Hugging Face folders of the model; no resume from them")
    background_executor: str = option(
        "process", help="what writes checkpoints while training goes on", choices=EXECUTORS
    )
    from_ckpt: Path | None = option(None, help="checkpoint to take the weights from, and nothing else")
    resume_ckpt: str | None = option(
        None, help="checkpoint to go on from, or `auto`: the newest complete one under --checkpoint, or none"
    )
    lock_wait: int = option(
        300,
        most=MOST_SECONDS,
        help="seconds that --resume_ckpt auto waits for another run to leave its folders",
        metavar="SECONDS",
    )
    force_resume: bool = option(False, help="go on although data or options differ from the checkpoint's run")
    tag: str | None = option(
        None,
        help="the checkpoint inside --from_ckpt or --resume_ckpt: a step, such as 1000, or a folder's name [default:"
        " the newest]",
    )
    output_dir: Path | None = option(None, "-o", help="where the Hugging Face folder is written at the end")
    export: str = option(
        "last",
        help="which weights --output_dir gets: the last, or those of the checkpoint with the lowest evaluation loss",
        choices=("last", "best"),
    )
