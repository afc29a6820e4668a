"""Every option of the trainer, once: flags, TOML keys and `--help` come from these fields (see `jllm.options`)."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.machine import parse_duration
from jllm.options import check_ranges, option
from jllm.train.limits import MOST_RATE, MOST_ROWS, MOST_SECONDS, MOST_STEPS, MOST_WEIGHT
from jllm.train.records.sinks.names import services_of

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PRECISIONS = ("bf16", "fp16", "fp32")
EXECUTORS = ("process", "thread", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of a run. `__post_init__` refuses what is impossible whatever the data, model and world size."""

    # Data
    train_data: tuple[str, ...] = option(
        (),
        group="Data",
        metavar="FOLDER[=WEIGHT]",
        help="folder of shards to train on, or a JSONL or text file, converted first; may be given several times; an"
        " epoch has the rows WEIGHT times: 2.5 is twice, and a half of them a third time",
    )
    dist_data: bool = option(False, help="each node has a part of its own of --train_data, under the same name")
    seq_len: int | None = option(
        None,
        least=1,
        most=1 << 30,
        help="longest sequence given to the model; rows may have one token more [default: what the data needs]",
    )
    block_mask: bool = option(False, help="documents packed in one row do not attend to each other")
    no_shuf: bool = option(False, help="read the rows in the order of the files in every epoch")
    seed: int = option(1234, help="seed of the data order and of --init")
    num_workers: int = option(
        1, most=1 << 16, help="threads that read ahead on the first stage; 0 reads between the steps"
    )
    skip_train_steps: str = option("", help='steps whose data is consumed without training on it: "3,4"')

    # Model
    model: Path | None = option(
        None, "-m", group="Model", help="Hugging Face folder of the model: configuration, weights, tokenizer"
    )
    init: bool = option(False, help="start from random weights made from the model's configuration")
    trust_remote_code: bool = option(False, help="run model code that comes with the folder")
    attn_implementation: str = option(
        "auto",
        help="attention kernel: auto, varlen, flash_attention_2, flash_attention_3, flex_attention, sdpa, eager",
    )
    dropout: float | None = option(
        None,
        most=1,
        below_most=True,
        help="dropout instead of that of the model's configuration, where that has one above 0; 0: none"
        " [default: what the configuration says]",
    )
    force_tokenizer: bool = option(
        False, help="train although the data was made with another tokenizer than the model's"
    )
    check_weights: bool = option(
        False, help="with --dry_run: read all weights of --model, and refuse what is not finite, as a run does"
    )
    target_modules: str | None = option(None, help="train only parameters whose name matches these patterns, by commas")
    frozen_modules: str | None = option(None, help="freeze parameters whose name matches these patterns, by commas")
    layers_to_transform: str | None = option(None, help='of the decoder layers, train only these: "0:7,24:31"')

    # Parallelism
    pipe_parallel_size: int = option(
        1,
        least=1,
        most=1 << 20,
        group="Parallelism",
        help="pipeline stages; what remains of the processes is data-parallel",
    )
    processes: int | None = option(
        None,
        least=1,
        help="without a launcher: start so many processes on this machine through DeepSpeed's [default: one pipeline]",
    )
    model_parallel_size: int = option(
        1, "--tensor_parallel_size", least=1, help="tensor-parallel processes; only 1 in this version"
    )
    sequence_parallel_size: int = option(1, least=1, help="sequence-parallel processes; only 1 in this version")
    zero_stage: int | None = option(
        None,
        most=3,
        help="0 or 1: whether data-parallel ranks share the optimizer's state [default: 1 for bf16, 0 for fp32]",
    )
    ds_config: Path | None = option(None, help="JSON file of further DeepSpeed settings")
    partition_method: str = option(
        "fast", help='layers to stages: fast, mem, uniform, parameters, profile, type:regex, "9,5" or "0,8,17,26"'
    )
    split_dlayer: bool = option(False, help="cut stages between attention and mlp; refused, with what it would gain")
    emb_partitions: int = option(1, help="parts of embedding and head; more than 1 is refused, with what it would gain")
    timeout: int = option(1800, least=1, most=MOST_SECONDS, help="seconds after which a collective operation gives up")

    # Steps
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

    # Optimizer
    optimizer: str = option("adamw", group="Optimizer", help="which optimizer", choices=("adamw", "sgd"))
    learning_rate: float = option(1e-5, most=MOST_RATE, help="peak learning rate")
    lr_min: float = option(0.0, most=MOST_RATE, help="learning rate that the decay ends at")
    force_constant_lr: float | None = option(
        None, most=MOST_RATE, help="learning rate from here on, whatever the schedule; also for a resumed run"
    )
    lr_scheduler_type: str = option("cosine", help="shape of the decay", choices=SCHEDULES)
    lr_cycles: int = option(1, least=1, most=MOST_STEPS, help="cycles of cosine_with_restarts")
    num_warmup_steps: float = option(
        0.0, most=MOST_STEPS, whole_from_1=True, help="warm-up: steps where at least 1, a share of all steps below 1"
    )
    weight_decay: float = option(0.0, most=MOST_RATE, help="decoupled weight decay of matrices")
    adam_beta1: float = option(0.9, most=1, below_most=True, help="AdamW's beta 1")
    adam_beta2: float = option(0.999, most=1, below_most=True, help="AdamW's beta 2")
    adam_eps: float = option(1e-8, most=1, help="AdamW's epsilon")
    gradient_clipping: float = option(1.0, most=10**9, help="largest global gradient norm; 0 does not clip")
    precision: str = option(
        "bf16", help="bf16 and fp16 keep fp32 master weights; bf16 sums gradients in fp32", choices=PRECISIONS
    )
    deterministic: bool = option(
        False, help="on GPUs, use kernels whose results do not vary: resumed runs are bit-identical, steps are slower"
    )
    on_nan: str = option(
        "stop", help="a loss or gradient that is not finite: stop, or skip the step", choices=("stop", "skip")
    )
    router_aux_loss_coef: float | None = option(
        None,
        most=MOST_RATE,
        help="weight of the mixture-of-experts balance loss; 0 only watches [default: not computed]",
    )

    # Memory
    checkpoint_grad_interval: int = option(
        0, group="Memory", help="keep activations of every k-th layer, recompute the rest; 0 off"
    )
    checkpoint_grad_attention: bool = option(False, help="recompute the attention of each layer only")
    checkpoint_grad_offload: bool = option(False, help="keep the checkpointed activations in host memory")
    no_checkpoint_grad_step: int = option(0, help="after this step activations are no longer recomputed; 0: always")

    # Checkpoints
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

    # Evaluation
    eval_data: tuple[str, ...] = option(
        (),
        group="Evaluation",
        metavar="[NAME=]FOLDER",
        help="shards to evaluate on, every row, in order; may be given several times",
    )
    steps_per_eval: float = option(
        0.0,
        most=MOST_STEPS,
        whole_from_1=True,
        help="steps between evaluations; below 1: a share of an epoch; 0: at the end of each epoch",
    )
    early_stop: int = option(0, help="stop after this many consecutive rebounds of the evaluation loss; 0: never")

    # Records
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

    # The call
    dry_run: bool = option(
        False,
        group="This command",
        help="print what differs from the defaults, stages, steps, estimates and warnings, and end without training",
    )
    json: bool = option(False, help="with --dry_run: print everything, all options too, as one JSON object")
    config: Path | None = option(
        None, help="TOML file of options, such as the config.toml in a run's log folder; flags win"
    )
    local_rank: int = option(-1, least=-1, help="set by the launcher", hidden=True)

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.model is None:
            raise UserError("--model is missing; give the Hugging Face folder of the model")
        if not self.train_data and self.num_train_epochs > 0:
            raise UserError("--train_data is missing; give a folder of shards, made by: python -m jllm.raw2ids")
        weighted_folders(self)
        if self.json and not self.dry_run:
            raise UserError("--json prints what --dry_run finds; give --dry_run too, or drop it")
        if self.batch_size_tokens is not None:
            rows_given = self.global_batch_size is not None or self.per_device_train_batch_size != 1
            if rows_given or self.dist_data:
                other = "--dist_data" if self.dist_data else "--per_device_train_batch_size and --global_batch_size"
                raise UserError(
                    f"--batch_size_tokens {self.batch_size_tokens} sets how many rows a step has; drop it, or {other}"
                )
        if self.clean and (self.resume_ckpt is not None or self.from_ckpt is not None):
            raise UserError("--clean removes earlier runs; drop it, or --resume_ckpt and --from_ckpt")
        if self.global_batch_size is not None and self.gradient_accumulation_steps is not None:
            raise UserError(
                "--global_batch_size and --gradient_accumulation_steps exclude each other; give one of them"
            )
        if self.from_ckpt is not None and self.resume_ckpt is not None:
            raise UserError("--from_ckpt and --resume_ckpt exclude each other: weights only, or everything; give one")
        if self.num_train_epochs == 0 and (self.from_ckpt is None or self.output_dir is None):
            raise UserError("--num_train_epochs 0 converts a checkpoint: give --from_ckpt and --output_dir")
        if self.resume_ckpt == "auto" and self.checkpoint is None:
            raise UserError("--resume_ckpt auto looks under --checkpoint; give that folder")
        for name in ("model_parallel_size", "sequence_parallel_size"):
            if getattr(self, name) != 1:
                raise UserError(
                    f"--{name} {getattr(self, name)}: this version has pipeline and data parallelism; give 1"
                )
        if self.split_dlayer or self.emb_partitions != 1:
            from jllm.models.pipeline.partition import (
                check_cuts,  # here: it imports transformers, which a plain --help must not
            )

            check_cuts(split_dlayer=self.split_dlayer, emb_partitions=self.emb_partitions)
        if self.zero_stage not in (None, 0, 1):
            raise UserError(f"--zero_stage {self.zero_stage}: a pipeline works with 0 or 1")
        if self.zero_stage == 0 and self.precision != "fp32":
            raise UserError(
                f"--zero_stage 0 with --precision {self.precision}: fp32 master weights need --zero_stage 1"
            )
        checkpointed = self.checkpoint_grad_interval or self.checkpoint_grad_attention
        if (self.checkpoint_grad_offload or self.no_checkpoint_grad_step) and not checkpointed:
            raise UserError(
                "--checkpoint_grad_offload and --no_checkpoint_grad_step need --checkpoint_grad_interval or"
                " --checkpoint_grad_attention"
            )
        if self.early_stop and not self.eval_data:
            raise UserError("--early_stop looks at the evaluation loss; give --eval_data")
        if self.best_of and not self.eval_data:
            raise UserError("--best_of looks at the evaluation loss; give --eval_data")
        if self.export == "best" and not (self.best_of and self.checkpoint):
            raise UserError("--export best takes a checkpoint that --best_of keeps; give --best_of 1 and --checkpoint")
        if self.time_limit_seconds is not None and (self.checkpoint is None or self.only_ckpt_model):
            why = (
                "--only_ckpt_model leaves nothing to go on from" if self.only_ckpt_model else "there is no --checkpoint"
            )
            raise UserError(
                f"--time_limit saves and leaves, and {why}; give a folder for checkpoints of the whole state"
            )
        if self.trace_step is not None and self.resolved_log_dir is None:
            raise UserError(f"--trace_step {self.trace_step} writes beside the records; give --log_dir or --checkpoint")
        if self.only_ckpt_model and self.resume_ckpt == "auto":
            raise UserError("--only_ckpt_model leaves nothing to resume from; drop it, or --resume_ckpt auto")
        if self.lr_min > self.learning_rate:
            raise UserError(
                f"--lr_min {self.lr_min:g} is above --learning_rate {self.learning_rate:g}, from which the rate falls"
                " to it; give less"
            )
        _check_folders(self)
        services_of(self.report_to)
        skipped_steps(self)
        parse_epochs(self.ckpt_epoch, "--ckpt_epoch")
        parse_epochs(self.skip_epoch, "--skip_epoch")
        named_folders(self.eval_data)

    @property
    def wanted_processes(self) -> int:
        """How many processes a run without a launcher has."""
        return self.processes or self.pipe_parallel_size

    @property
    def time_limit_seconds(self) -> float | None:
        """`--time_limit` as a number."""
        return None if self.time_limit is None else parse_duration("--time_limit", self.time_limit)

    @property
    def saves_state(self) -> bool:
        """Whether a run can go on from what this one saves."""
        return self.checkpoint is not None and not self.only_ckpt_model

    @property
    def resolved_log_dir(self) -> Path | None:
        """`--log_dir`, or `log` inside `--checkpoint` or `--output_dir`, or None where there is no place."""
        if self.log_dir is not None:
            return self.log_dir
        base = self.checkpoint or self.output_dir
        return base / "log" if base is not None else None

    @property
    def resolved_zero_stage(self) -> int:
        """`--zero_stage`, or what the precision needs."""
        return self.zero_stage if self.zero_stage is not None else int(self.precision != "fp32")


def _check_folders(config: TrainConfig) -> None:
    """Raises:
    UserError: a run would write over its own model.
    """
    for name in ("checkpoint", "output_dir", "log_dir"):
        folder = getattr(config, name)
        if folder is not None and config.model is not None and folder.resolve() == config.model.resolve():
            raise UserError(f"--{name} {folder} is the folder of --model, which a run leaves as it is; give another")


def skipped_steps(config: TrainConfig) -> frozenset[int]:
    """`--skip_train_steps` as numbers."""
    return _numbers(config.skip_train_steps, "--skip_train_steps")


def parse_epochs(text: str, option_name: str) -> frozenset[int]:
    """ "1,3" as numbers of epochs, counted from 1."""
    return _numbers(text, option_name)


def _numbers(text: str, option_name: str) -> frozenset[int]:
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in given):
        raise UserError(f'{option_name} "{text}": give whole numbers from 1, such as "3,4"')
    return frozenset(int(part) for part in given)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightedFolder:
    """A data set, and how often an epoch has its rows."""

    folder: Path
    weight: float = 1.0


def weighted_folders(config: TrainConfig) -> list[WeightedFolder]:
    """`--train_data` taken apart.

    Raises:
        UserError: a weight that is not above 0, or beyond `MOST_WEIGHT`.
    """
    found = []
    for item in config.train_data:
        folder, _, weight = item.rpartition("=")
        try:
            number = float(weight)
        except ValueError:
            folder, number = item, 1.0
        if not folder:
            folder, number = item, 1.0
        if not 0 < number < math.inf:
            raise UserError(f"--train_data {item}: the weight is above 0, such as {folder}=0.5")
        if number > MOST_WEIGHT:
            raise UserError(
                f"--train_data {item}: an epoch would have each row {number:g} times; give at most {MOST_WEIGHT}, and"
                " more with --num_train_epochs"
            )
        found.append(WeightedFolder(folder=Path(folder), weight=number))
    return found


def named_folders(given: tuple[str, ...]) -> dict[str, Path]:
    """`NAME=FOLDER` or `FOLDER` (named after its last part) → the folders by name.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, Path] = {}
    for item in given:
        name, equals, folder = item.partition("=")
        path = Path(folder if equals else item)
        name = name if equals else path.name
        if name in found:
            raise UserError(f"--eval_data {item}: there are two sets named {name}; give other names: NAME=FOLDER")
        found[name] = path
    return found


def resolved_options(config: TrainConfig) -> dict[str, Any]:
    """The options as JSON values."""
    values = dataclasses.asdict(config)
    values.pop("local_rank")
    return json.loads(json.dumps(values, default=str))  # type: ignore[no-any-return]
