"""Every option of the trainer, once: flags, TOML keys and `--help` come from these fields (see `jllm.options`).

The fields stand in `jllm.train.options`; what one says about another is checked here."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.machine import parse_duration
from jllm.options import check_ranges
from jllm.ranges import named_number
from jllm.train.limits import MOST_WEIGHT
from jllm.train.options.adapters import AdaptersOptions, check_adapters, precision_of_adapters
from jllm.train.options.call import CallOptions
from jllm.train.options.checkpoints import CheckpointsOptions
from jllm.train.options.data import DataOptions
from jllm.train.options.evaluation import EvaluationOptions
from jllm.train.options.memory import MemoryOptions
from jllm.train.options.model import ModelOptions
from jllm.train.options.objective import ObjectiveOptions, check_objective
from jllm.train.options.optimizer import WITHOUT_MASTERS, OptimizerOptions, check_optimizer
from jllm.train.options.parallelism import (
    OVERLAPPED,
    ParallelismOptions,
    check_halves,
    check_sequences,
    check_slices,
)
from jllm.train.options.quantisation import QuantisationOptions, check_quantisation
from jllm.train.options.records import RecordsOptions
from jllm.train.options.speed import SpeedOptions, check_speed
from jllm.train.options.steps import StepsOptions
from jllm.train.records.sinks.names import services_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(
    # A dataclass has the fields of its last base first.
    CallOptions,
    RecordsOptions,
    EvaluationOptions,
    CheckpointsOptions,
    MemoryOptions,
    SpeedOptions,
    OptimizerOptions,
    ObjectiveOptions,
    StepsOptions,
    ParallelismOptions,
    QuantisationOptions,
    AdaptersOptions,
    ModelOptions,
    DataOptions,
):
    """The options of a run. `__post_init__` refuses what is impossible whatever the data, model and world size."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.has_pairs:  # the sides of a pair, and pairs of a row, must not see each other
            object.__setattr__(self, "block_mask", True)
        if self.model is None:
            raise UserError("--model is missing; give the Hugging Face folder of the model")
        if not self.train_data and self.num_train_epochs > 0:
            raise UserError("--train_data is missing; give a folder of shards, made by: python -m jllm.raw2ids")
        weighted_folders(self)
        check_adapters(self)
        check_quantisation(self)
        check_objective(self, self.precision)
        check_optimizer(self)
        check_speed(self, self.precision, has_adapters=self.has_adapters)
        _check_adapters_in_run(self)
        _check_pairs(self)
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
        if self.sequence_parallel_size > 1:
            check_sequences(self)
        if self.async_tensor_model_parallel_allreduce:
            raise UserError(
                "--async_tensor_model_parallel_allreduce: sums of slices do not overlap with products; drop it, or give"
                " --sequence_sharded_norms, with which slices share the tokens between attention and mlp"
            )
        if self.sequence_sharded_norms and self.model_parallel_size == 1:
            raise UserError("--sequence_sharded_norms is for slices of a stage; give --model_parallel_size, or drop it")
        if self.model_parallel_size > 1:
            check_slices(self)
        if self.split_dlayer and self.pipe_parallel_size > 1:
            check_halves(self)
        if self.emb_partitions != 1:
            from jllm.models.pipeline.partition import (
                check_cuts,  # here: it imports transformers, which a plain --help must not
            )

            check_cuts(emb_partitions=self.emb_partitions)
        if self.overlaps and self.pipe_parallel_size == 1:
            raise UserError(
                f"--schedule {OVERLAPPED} is for what crosses stages, and there is one stage; give"
                " --pipe_parallel_size, or drop it"
            )
        if self.overlaps and self.batch_size_tokens is not None:
            raise UserError(
                f"--schedule {OVERLAPPED} needs micro-batches of one shape, and those of --batch_size_tokens differ;"
                " drop one of them"
            )
        if self.zero_stage not in (None, 0, 1):
            raise UserError(f"--zero_stage {self.zero_stage}: a pipeline works with 0 or 1")
        if self.zero_stage == 1 and self.optimizer in WITHOUT_MASTERS:
            raise UserError(
                f"--zero_stage 1 with --optimizer {self.optimizer}, which needs whole matrices; give --zero_stage 0"
            )
        if self.offload_optimizer and self.engine_precision != "bf16":
            held = f"--optimizer {self.optimizer}" if self.optimizer in WITHOUT_MASTERS else f"{self.trained_precision}"
            raise UserError(
                f"--offload_optimizer moves the fp32 masters of bf16 weights, which {held} does not have; drop it, or"
                f" give --precision bf16{' and --lora_dtype bf16' * self.has_adapters} with adamw, sgd or schedule_free"
            )
        if self.zero_stage == 0 and self.engine_precision != "fp32":
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
        if self.time_limit_seconds is not None and (self.checkpoint is None or self.only_exports):
            why = (
                f"--{self.only_exports} leaves nothing to go on from"
                if self.only_exports
                else "there is no --checkpoint"
            )
            raise UserError(
                f"--time_limit saves and leaves, and {why}; give a folder for checkpoints of the whole state"
            )
        for name in ("trace_step", "profile_step"):
            if (step := getattr(self, name)) is not None and self.resolved_log_dir is None:
                raise UserError(f"--{name} {step} writes beside the records; give --log_dir or --checkpoint")
        if self.only_exports and self.resume_ckpt == "auto":
            raise UserError(f"--{self.only_exports} leaves nothing to resume from; drop it, or --resume_ckpt auto")
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
        return self.processes or self.pipe_parallel_size * self.sequence_parallel_size * self.model_parallel_size

    @property
    def time_limit_seconds(self) -> float | None:
        """`--time_limit` as a number."""
        return None if self.time_limit is None else parse_duration("--time_limit", self.time_limit)

    @property
    def saves_state(self) -> bool:
        """Whether a run can go on from what this one saves."""
        return self.checkpoint is not None and not self.only_exports

    @property
    def only_exports(self) -> str | None:
        """The option that makes checkpoints folders of the model or the adapters alone, where it is given."""
        return next((name for name in ("only_ckpt_model", "only_ckpt_lora") if getattr(self, name)), None)

    @property
    def trained_precision(self) -> str:
        """The type of what trains: that of the adapters, or `--precision`. bf16 and fp16 have fp32 masters."""
        return self.adapter_precision if self.has_adapters else self.precision

    @property
    def engine_precision(self) -> str:
        """The type in which DeepSpeed's engine keeps masters of its own; fp32 where it has none."""
        return "fp32" if self.optimizer in WITHOUT_MASTERS else self.trained_precision

    @property
    def adapter_precision(self) -> str:
        """`--lora_dtype`, or what the precision of the model allows."""
        return precision_of_adapters(self.lora_dtype, self.precision)

    @property
    def reads_weights(self) -> bool:
        """Whether a run reads the weights of `--model`: a checkpoint of adapters has none of them."""
        return not self.init and (self.from_ckpt is None or self.has_adapters)

    @property
    def resolved_log_dir(self) -> Path | None:
        """`--log_dir`, or `log` inside `--checkpoint` or `--output_dir`, or None where there is no place."""
        if self.log_dir is not None:
            return self.log_dir
        base = self.checkpoint or self.output_dir
        return base / "log" if base is not None else None

    @property
    def overlaps(self) -> bool:
        """Whether what crosses stages travels while they compute."""
        return self.schedule == OVERLAPPED

    @property
    def resolved_zero_stage(self) -> int:
        """`--zero_stage`, or what the precision needs."""
        return self.zero_stage if self.zero_stage is not None else int(self.engine_precision != "fp32")


def _check_adapters_in_run(config: TrainConfig) -> None:
    """Raises:
    UserError: options that say nothing of a frozen model, or types that do not go together.
    """
    if config.load_in is not None and not config.has_adapters:
        raise UserError(
            f"--{config.load_in}: a quantised model is not trained itself, adapters beside it are; give --lora_dim,"
            " --lora or --control_adapter_rank too, or drop it"
        )
    if config.load_in is not None and config.init:
        raise UserError(f"--{config.load_in} quantises the weights of --model, and --init has none; drop one")
    if not config.has_adapters:
        return
    for name in ("target_modules", "layers_to_transform"):
        if getattr(config, name) is not None:
            raise UserError(
                f"--{name} chooses among the model's own parameters, which are frozen with adapters; give"
                f" --{_INSTEAD[config.has_control, name]}"
            )
    if config.only_ckpt_model:
        raise UserError("--only_ckpt_model writes the model, which adapters leave as it is; give --only_ckpt_lora")
    if config.router_aux_loss_coef:
        raise UserError(
            f"--router_aux_loss_coef {config.router_aux_loss_coef:g} trains routers, which are frozen with adapters;"
            " give 0 to watch them, or drop it"
        )
    if config.lora_dtype not in (None, "fp32", config.precision):
        raise UserError(
            f"--lora_dtype {config.lora_dtype} with --precision {config.precision}: adapters are fp32 or of the model's"
            " type; give fp32, or drop it"
        )
    if config.precision == "fp16" and config.lora_dtype == "fp32":
        raise UserError("--lora_dtype fp32 with --precision fp16, whose loss is scaled with fp16 adapters; drop it")
    _check_what_follows_steps(config)
    if config.modules_to_save is not None and config.adapter_precision != config.precision:
        raise UserError(
            f"--modules_to_save are trained in the model's type, {config.precision}; give --lora_dtype"
            f" {config.precision} too, which keeps fp32 masters"
        )


_INSTEAD = {
    (False, "target_modules"): "lora_target_modules",
    (False, "layers_to_transform"): "lora_layers",
    (True, "target_modules"): "control_adapter_layers",
    (True, "layers_to_transform"): "control_adapter_layers",
}
"""With control adapters or without, the option for the model's own parameters → that for adapters."""


def _check_what_follows_steps(config: TrainConfig) -> None:
    """Raises:
    UserError: what changes adapters after a step needs fp32 ones, and an optimizer that has no second point.
    """
    if config.has_control and config.weight_decay:
        raise UserError(
            f"--weight_decay {config.weight_decay:g} with --control_adapter_rank, whose directions keep their length;"
            " give --control_weight_decay, for its strengths"
        )
    asked = [
        name
        for name in ("lora_weight_decay", "lora_max_norm", "control_adapter_rank")
        if getattr(config, name) not in (None, 0)
    ]
    for name in asked:
        if config.adapter_precision != "fp32":
            raise UserError(
                f"--{name} changes adapters after each step, which needs fp32 ones, and these are"
                f" {config.adapter_precision}; give --lora_dtype fp32 and --precision bf16 or fp32"
            )
        if config.optimizer == "schedule_free":
            raise UserError(
                f"--{name} with --optimizer schedule_free, which evaluates an average that it would not reach; give"
                " another optimizer"
            )


def _check_pairs(config: TrainConfig) -> None:
    """Raises:
    UserError: options that say nothing of preference pairs, or of writing references of them.
    """
    if config.has_pairs and config.has_control:
        what = f"--loss {config.loss}" if config.is_preference else "--write_ref_logps"
        raise UserError(f"--control_adapter_rank trains on classes of text, and {what} on pairs; drop one of them")
    if config.write_ref_logps is None:
        return
    without_meaning = ("eval_data", "checkpoint", "resume_ckpt", "from_ckpt", "output_dir", "log_dir", "max_steps",
                       "batch_size_tokens", "dist_data", "clean", "init")  # fmt: skip
    for name in without_meaning:
        if getattr(config, name):
            raise UserError(f"--write_ref_logps reads --train_data once, forward only; drop --{name}")
    given = weighted_folders(config)
    if len(given) != 1 or given[0].weight != 1:
        raise UserError("--write_ref_logps writes one data set at a time; give one --train_data, without a weight")


def _check_folders(config: TrainConfig) -> None:
    """Raises:
    UserError: a run would write over its own model, or over the adapter that it starts from.
    """
    for name in ("checkpoint", "output_dir", "log_dir"):
        folder = getattr(config, name)
        for source in ("model", "lora"):
            read = getattr(config, source)
            if folder is not None and read is not None and folder.resolve() == read.resolve():
                raise UserError(
                    f"--{name} {folder} is the folder of --{source}, which a run leaves as it is; give another"
                )


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
        folder, number = named_number(item) or (item, 1.0)
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
