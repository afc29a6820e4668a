"""Going on from a checkpoint: which one, whether it is intact and fits this run, and weights alone.

A checkpoint keeps what decides the model's architecture and how long the run was, beside the options, so that another
model is refused by name even where its tensors would fit. Every shape is checked too, forced or not, and no tensor of
the checkpoint may be left over: what is then loaded is the whole model of the checkpoint, and nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from jllm.errors import UserError
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.weights.saving import ExportedFolder
from jllm.parallel.tensor.slices import whole_shape
from jllm.train.checkpoint.folders import (
    INDEX_NAME,
    find_checkpoint,
    folder_of_step,
    list_checkpoints,
    step_of_folder,
)
from jllm.train.checkpoint.format import WEIGHT, RunState
from jllm.train.checkpoint.frozen_parts import check_same_adapters, check_same_frozen_parts, frozen_parts
from jllm.train.checkpoint.held import read_parts
from jllm.train.checkpoint.reader import CheckpointReader, DamagedCheckpointError
from jllm.train.checkpoint.state import TrainingState
from jllm.train.checkpoint.verify import verify
from jllm.train.checkpoint.weights_alone import (
    ARCHITECTURE,
    architecture_of,
    check_architecture,
    misfit,
    weight_alone,
)
from jllm.train.config import TrainConfig, resolved_options
from jllm.train.data.batching import NEWEST_RULE, RULES
from jllm.train.distributed.agreement import Agreement
from jllm.train.quantisation import read_model_config
from jllm.train.shape import RunShape

BINDING_OPTIONS = (
    "loss",
    "loss_gamma",
    "beta",
    "label_smoothing",
    "simpo_gamma",
    "pref_ftx",
    "dropout",
    "optimizer",
    "module_learning_rate",
    "learning_rate",
    "lr_min",
    "lr_scheduler_type",
    "lr_cycles",
    "num_warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_eps",
    "gradient_clipping",
    "precision",
    "fp8",
    "seed",
    "no_shuf",
    "block_mask",
    "seq_len",
    "global_batch",
    "batch_size_tokens",
    "target_modules",
    "frozen_modules",
    "layers_to_transform",
    "lora_dim",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_layers",
    "use_rslora",
    "use_dora",
    "loraplus_lr_ratio",
    "modules_to_save",
    "lora_dtype",
    "lora_compute",
    "lora_weight_decay",
    "lora_max_norm",
    "control_adapter_rank",
    "control_adapter_gamma",
    "control_adapter_layers",
    "control_weight_decay",
    "neftune_alpha",
    "router_aux_loss_coef",
    "skip_train_steps",
)
"""Options whose change would make the rest of the run another run."""

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
"""What a run had whose version did not know an option yet."""

BATCHING_RULE = "batching_rule"
TOTAL_STEPS = "total_steps"


def find_resume_points(config: TrainConfig, agreement: Agreement) -> list[Path]:
    """The checkpoints of `--resume_ckpt`, on every process, the one to take first; none to start afresh.

    `auto` means all that are complete on every node, the newest first. Nodes may have folders of their own.
    """
    if config.resume_ckpt is None:
        return []
    if config.resume_ckpt == "auto":
        if config.tag is not None:
            raise UserError(
                f"--resume_ckpt auto takes the newest checkpoint, --tag {config.tag} that one; drop --tag, or give"
                f" --resume_ckpt {config.checkpoint}"
            )
        assert config.checkpoint is not None
        steps = [set(map(step_of_folder, list_checkpoints(config.checkpoint)))]
        common = set.intersection(*(found for each in agreement.gather(steps) for found in each))
        return [folder_of_step(config.checkpoint, step) for step in sorted(common, reverse=True)]
    given = Path(config.resume_ckpt)
    name = agreement.from_first_reader(lambda: str(find_checkpoint(given, config.tag, option="--resume_ckpt")))
    return [Path(name)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intact:
    """A checkpoint whose bytes are what was written, as far as the processes read them.

    Attributes:
        reader: of it.
        damaged: what is wrong with those that would have been taken before it, a line each.
    """

    reader: CheckpointReader
    damaged: list[str]


def first_intact(
    folders: Sequence[Path], agreement: Agreement, check: Callable[[CheckpointReader], None], state: TrainingState
) -> Intact:
    """The first of `folders` that is intact; every process calls it.

    Args:
        folders: as `find_resume_points` gives them.
        check: looks at what the index says; what it raises is no damage.
        state: what is going to be read.

    Raises:
        UserError: on every process: none is intact; what is wrong, and which other checkpoint is good.
    """
    damaged: list[str] = []
    for folder in folders:
        found = agreement.gather_first(lambda folder=folder: _damage_of_index(folder))  # type: ignore[misc]
        if found is None:
            reader = CheckpointReader(folder)
            check(reader)
            found = agreement.gather_first(lambda reader=reader: _damage(reader, state, agreement.rank))  # type: ignore[misc]
            if found is None:
                return Intact(reader=reader, damaged=damaged)
        damaged.append(found)
    raise UserError(agreement.from_first_reader(lambda: f"{damaged[0]}; {_way_out(folders)}"))


def _damage_of_index(folder: Path) -> str | None:
    try:
        CheckpointReader(folder)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def _damage(reader: CheckpointReader, state: TrainingState, rank: int) -> str | None:
    try:
        state.check(reader)
        reader.rng(rank)
    except DamagedCheckpointError as error:
        return str(error)
    return None


def _way_out(damaged: Sequence[Path]) -> str:
    """What to do where these are damaged: the newest good one beside them, for which all of them are read."""
    others = [folder for folder in reversed(list_checkpoints(damaged[0].parent)) if folder not in damaged]
    for folder in others:
        try:
            if not verify(folder):
                return f"the newest good one is {folder}"
        except UserError:  # nothing can be said of it
            continue
    return f"no other checkpoint in {damaged[0].parent} is known to be good; start over with --clean"


def check_same_run(saved: RunState, now: RunState, *, forced: bool) -> None:
    """Refuse, by name, what differs between the checkpoint's run and this one, unless `--force_resume` is given.

    Raises:
        UserError: the model, the data set or a binding option is another.
    """
    if forced:
        return
    check_architecture(saved, now.config[ARCHITECTURE], "--resume_ckpt")
    if saved.fingerprint != now.fingerprint:
        raise UserError(
            f"--train_data has changed since the checkpoint (fingerprint {saved.fingerprint[:12]} then,"
            f" {now.fingerprint[:12]} now); train on the same data, or give --force_resume"
        )
    check_same_frozen_parts(saved.config, now.config)
    for name in BINDING_OPTIONS:
        given = now.config.get(name)
        then = saved.config.get(name, _DEFAULTS.get(name))
        if then != given and not (name == "lora_alpha" and _scale(saved.config) == _scale(now.config)):
            shown = "--global_batch_size" if name == "global_batch" else f"--{name}"
            advice = f"give {shown if then is True else then}" if then not in (None, False, ()) else "drop it"
            raise UserError(
                f"{shown} was {_said(then)} in the checkpoint's run and is {_said(given)} now; {advice}, or"
                " --force_resume"
            )


def _scale(config: dict[str, Any]) -> Any:
    """`--lora_alpha`, or the rank where it is not given."""
    return config.get("lora_dim") if config.get("lora_alpha") is None else config.get("lora_alpha")


def _said(value: Any) -> str:
    """The value of an option, for people."""
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


def other_length(saved: RunState, now: RunState) -> str | None:
    """A warning where the run has another number of steps than the checkpoint's, and its rates depend on that."""
    then, given = saved.config.get(TOTAL_STEPS), now.config[TOTAL_STEPS]
    if then is None or then == given or not _rates_depend_on_length(now.config):
        return None
    return (
        f"warning: the checkpoint's run had {then} steps and this one has {given}, on which the learning rates of"
        f" --lr_scheduler_type {now.config['lr_scheduler_type']} depend: from here on they are not those of either"
    )


def batching_rule(candidates: Sequence[Path], agreement: Agreement) -> int:
    """The rule by which a run groups rows by tokens: that of the checkpoint it goes on from, the newest for a new run.

    Args:
        candidates: as `find_resume_points` gives them.
        agreement: the processes; all of them call it.

    Raises:
        UserError: on every process: the rule is one of a later version.
    """

    def find() -> int:
        for folder in candidates:
            try:
                saved = CheckpointReader(folder).state
            except DamagedCheckpointError:  # said, or passed over, where the checkpoints are compared
                continue
            rule = int(saved.config.get(BATCHING_RULE, 1))
            if rule not in RULES:
                raise UserError(
                    f"{folder} is of a run that groups rows by rule {rule}, this version of jllm knows"
                    f" {', '.join(map(str, RULES))}; go on with the version that began it"
                )
            return rule
        return NEWEST_RULE

    return agreement.from_first_reader(find)


def record_of_run(config: TrainConfig, shape: RunShape, total_steps: int, *, rule: int = NEWEST_RULE) -> dict[str, Any]:
    """What a checkpoint keeps of the run that it is of: its options, and what `check_same_run` asks of them."""
    assert config.model is not None
    family = read_model_config(config)
    return {
        **resolved_options(config),
        "global_batch": shape.global_batch,
        TOTAL_STEPS: total_steps,
        BATCHING_RULE: rule,
        ARCHITECTURE: architecture_of(family),
        **(frozen_parts(config) if config.has_adapters else {}),
    }


def _rates_depend_on_length(config: dict[str, Any]) -> bool:
    """Whether the learning rate of a step depends on how many steps the run has."""
    if config["force_constant_lr"] is not None or config["lr_scheduler_type"] == "constant":
        return False
    return bool(config["lr_scheduler_type"] != "constant_with_warmup" or 0 < config["num_warmup_steps"] < 1)


def check_weights(reader: CheckpointReader, stage: PipelineStage, agreement: Agreement) -> None:
    """See to it that the checkpoint has the weights of this model, all of them and no others; every process calls it.

    Raises:
        UserError: on every process: a shape differs, a weight is missing, or one has no place.
    """
    parameters = stage.stored_parameters()
    shapes = {name: whole_shape(parameter) for name, parameter in parameters.items()}
    mistake = misfit(reader, shapes, has_adapters=stage.is_frozen)
    told = agreement.gather(set(parameters) if agreement.place.is_writer else set())
    left_over = reader.names(WEIGHT).difference(*told)  # a node's own folder may have less than the others
    if mistake is None and left_over:
        mistake = f"{min(left_over)} has no place in --model"
    mistakes = [each for each in agreement.gather(mistake) if each is not None]
    if mistakes:
        raise UserError(f"{reader.folder}: {mistakes[0]}: give the checkpoint of this model")


def optimizer_starts_afresh(
    reader: CheckpointReader, state: TrainingState, agreement: Agreement, *, forced: bool
) -> bool:
    """Whether the checkpoint lacks optimizer state that this run goes on from; every process calls it.

    Then all of it starts afresh, because AdamW counts its steps for all parameters alike. Before the first update there
    is none, and nothing is lost.

    Raises:
        UserError: on every process: state is lost, and nobody allowed that.
    """
    missing = [each for each in agreement.gather(state.missing_state(reader)) if each is not None]
    if missing and reader.state.optimizer_steps and not forced:
        raise UserError(
            f"{reader.folder} has no {missing[0]}, which --optimizer goes on from: give the options of its run, or"
            " --force_resume to start the optimizer's state afresh"
        )
    return bool(missing)


def is_exported(folder: Path, checkpoint: Path, kind: ExportedFolder) -> bool:
    """Whether `folder` holds a complete export of this kind, made after `checkpoint`."""
    marker, index = folder / kind.marker, checkpoint / INDEX_NAME
    if not marker.is_file() or marker.stat().st_mtime < index.stat().st_mtime:
        return False
    return kind.has_weights(folder)


def load_weights_only(stage: PipelineStage, config: TrainConfig, agreement: Agreement) -> RunState:
    """Take the weights of `--from_ckpt` into a stage: the fp32 masters where the checkpoint has them.

    Returns:
        The state of the run that they are of.

    Raises:
        UserError: the checkpoint is of another model, or of adapters that were something else. `--force_resume` allows
            one whose weights have the same shapes.
    """
    assert config.from_ckpt is not None
    assert config.model is not None
    reader = CheckpointReader(find_checkpoint(config.from_ckpt, config.tag, option="--from_ckpt"))
    if not config.force_resume:
        family = read_model_config(config)
        check_architecture(reader.state, architecture_of(family), "--from_ckpt")
    load_weights(stage, reader, agreement)
    if config.has_adapters and not config.force_resume:
        check_same_adapters(reader.state.config, config)
    return reader.state


def load_weights(stage: PipelineStage, reader: CheckpointReader, agreement: Agreement) -> None:
    """Take the weights of a checkpoint into a stage: the fp32 masters where it has them and the stage is in fp32.

    Of a schedule-free optimizer's these are the averaged ones.

    Raises:
        UserError: on every process: the checkpoint is of another model.
    """
    check_weights(reader, stage, agreement)
    with torch.no_grad():
        for name, parameter in stage.stored_parameters().items():
            read = functools.partial(weight_alone, reader, name, dtype=parameter.dtype)
            weight = read_parts(read, parameter)
            assert weight is not None, name
            parameter.copy_(weight.view(parameter.shape))


def check_steps_left(config: TrainConfig, checkpoint: str, *, step: int, total_steps: int) -> None:
    """Raises:
    UserError: a run that goes on from a checkpoint after `step` would have nothing to do. With `--resume_ckpt auto`,
        the line that is given again and again, that is its end and no mistake.
    """
    if step > total_steps or (step == total_steps and config.resume_ckpt != "auto"):
        raise UserError(
            f"{checkpoint} is after step {step} of {total_steps}: nothing is left to train;"
            " raise --max_steps or --num_train_epochs"
        )
