"""`--dry_run`: what a run would be, without starting it.

Prints the options that differ from the defaults, the values that are set automatically, the stage table with estimated
memory, the pipeline's bubble, steps and tokens, a guess of the time where the device is known, and warnings last; with
`--json` all of it, and every option, as one JSON object. Needs no launcher: without one, a run of one pipeline is
assumed, or of `--processes`.

What a run refuses before its first step is refused here, by the same functions: data, evaluation sets, checkpoints,
and on stages without weights what is chosen of the model. Left out is what would write, or needs the other processes:
text is not converted, `--clean` is not checked, weights of `--model` are read beyond their headers only with
`--check_weights`, and the other nodes are not asked whether they see the same. Cost: opening the data, and reading the
weights of `--from_ckpt` once.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from deepspeed.accelerator import get_accelerator

from jllm.errors import say
from jllm.models.pipeline.carving import stage_class
from jllm.models.pipeline.partition import bubble_share
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.stage import PipelineStage
from jllm.models.trainable import attached_parameters, select_trainable
from jllm.models.weights.source import ModelInfo
from jllm.options import OF_THE_CALL, describe_differences, differences
from jllm.parallel.mesh import Mesh
from jllm.train import setup
from jllm.train.adapters import DTYPES
from jllm.train.advice import filling_lines
from jllm.train.checkpoint.reader import CheckpointReader, DamagedCheckpointError
from jllm.train.checkpoint.resume import (
    batching_rule,
    check_same_run,
    check_steps_left,
    check_weights,
    find_resume_points,
    load_weights_only,
    record_of_run,
)
from jllm.train.checks.room import check_room_for_all
from jllm.train.checks.start import check_start, check_weights_if_asked
from jllm.train.compiling import keep_code_private
from jllm.train.config import (
    TrainConfig,
    named_folders,
    resolved_options,
    weighted_folders,
)
from jllm.train.data.open import TEXT_SUFFIXES, Data, epoch_steps, open_training_data, planes_of
from jllm.train.distributed import launch
from jllm.train.distributed.agreement import Agreement
from jllm.train.distributed.deepspeed_engine import check_precision
from jllm.train.evaluate import open_evaluation_sets
from jllm.train.exporting import exported_folder
from jllm.train.fp8 import fp8_notes, use_fp8
from jllm.train.fused_loss import fused_loss_note
from jllm.train.lifecycle.run_folders import check_folders_are_free
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.optim.optimizers import parameter_groups
from jllm.train.optim.schedules import warmup_steps
from jllm.train.preference.identity import check_references
from jllm.train.preference.writing import check_target
from jllm.train.records.metrics import clock
from jllm.train.records.throughput import peak_flops
from jllm.train.shape import RunShape, automatic_options, resolve_shape
from jllm.train.triggers import Cadence

TYPICAL_UTILISATION = 0.4
"""The share of the device's peak that the time guess assumes."""

Fact = TypeVar("Fact")


class Alone(Agreement):
    """The readers of a run as this process imagines them: all of them see what it sees."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.place = mesh.place(0)

    def from_first_reader(self, find: Callable[[], Fact]) -> Fact:
        return find()

    def gather(self, value: Fact) -> list[Fact]:
        return [value] * self.mesh.data


def dry_run(config: TrainConfig) -> None:
    """Print the plan of a run, on the first process.

    Raises:
        UserError: the run could not start.
    """
    if not launch.is_first():
        return
    world_size = launch.world_size() if "WORLD_SIZE" in os.environ else config.wanted_processes
    shape = resolve_shape(config, world_size)
    notes = check_start(config, shape)
    model = setup.read_model_info(config)
    check_precision(config)
    if get_accelerator().device_name() == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # The threads that a process of the run would have: `--partition_method profile` times layers with them.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    agreement = Alone(shape.mesh)
    if config.num_train_epochs > 0:
        check_folders_are_free(config)
    steps = _Steps(config, shape, agreement, model) if config.num_train_epochs > 0 else None
    keep_code_private()
    family = setup.find_family(config)
    if steps is not None:
        steps.check_references(attention=family.kernel)
    plan = setup.plan_stages(config, shape, family, longest_row=steps.longest_row if steps is not None else None)
    stage = _whole_stage(config, family, plan)
    if config.from_ckpt is not None:
        load_weights_only(stage, config, agreement)
    if steps is not None and steps.resumed is not None:
        check_weights(steps.resumed, stage, agreement)
    check_room_for_all(config, agreement.place, stage, exported_folder(config, model, family.adapters))
    notes += fp8_notes(config, agreement, stage.model, stage.span, is_compiled=family.compiling.is_on)
    notes += [fused_loss_note(config, is_plain=stage.plain_head is not None), *check_weights_if_asked(config)]

    automatic = automatic_options(config, shape)
    if family.runs is not None:
        automatic["sequence_parallel_mode"] = family.runs.mode
    elif config.attn_implementation == "auto":
        automatic["attn_implementation"] = family.attention
    if config.compile == "auto":
        automatic["compile"] = "on" if family.compiling.is_on else "off"
    automatic |= steps.automatic if steps is not None else {}
    warnings = [*plan.warnings, *(steps.warnings if steps is not None else ())]
    seconds = None
    if steps is not None and steps.tokens and (peak := peak_flops()) is not None:
        seconds = steps.tokens * plan.flops_per_token / (peak * TYPICAL_UTILISATION * world_size)
    if config.json:
        found = _as_json(config, plan, steps, automatic, warnings, notes=notes, shape=shape, seconds=seconds)
        say(json.dumps(found, indent=1))
        return
    say("\n".join(describe_differences(config)))
    say(f"set automatically: {', '.join(f'{name} {value}' for name, value in automatic.items())}")
    say(plan.table)
    say(f"{shape.processes} on {world_size} processes")
    for line in (*plan.notes, *notes):
        say(line)
    if steps is None:
        say(f"no training: {config.output_dir} gets the weights of {config.from_ckpt}")
    else:
        say("\n".join(steps.lines))
        if seconds is not None:
            say(f"time: about {clock(seconds)} at {TYPICAL_UTILISATION:.0%} of the devices' peak")
        else:
            say("time: unknown" if peak_flops() is not None else "time: unknown on this device")
    for line in warnings:
        say(line)


def _as_json(
    config: TrainConfig,
    plan: setup.StagePlan,
    steps: "_Steps | None",
    automatic: dict[str, Any],
    warnings: list[str],
    *,
    notes: list[str],
    shape: RunShape,
    seconds: float | None,
) -> dict[str, Any]:
    """All that a dry run found, as JSON values."""
    options = resolved_options(config)
    return {
        "options": {name: value for name, value in {**options, **automatic}.items() if name not in OF_THE_CALL},
        "differs": {name: options[name] for name in differences(config)},
        "automatic": automatic,
        "stages": [dataclasses.asdict(stage) for stage in plan.stages],
        "bubble": bubble_share(shape.mesh.pipe, shape.accumulation),
        "pipelines": shape.mesh.data,
        "processes": shape.mesh.world_size,
        **(steps.numbers if steps is not None else {}),
        "parameters": plan.parameters.total,
        "trained_parameters": plan.parameters.trained,
        "lines": [*plan.notes, *notes, *(steps.lines if steps is not None else [])],
        "seconds": seconds,
        "warnings": [line.removeprefix("warning: ") for line in warnings],
    }


class _Steps:
    """The data of a run and the steps they make.

    Attributes:
        tokens: that the run trains on; None where that is not known.
        longest_row: in tokens; None where that is not known.
        resumed: the checkpoint that the run goes on from.
        automatic: options whose values come from the data and from checkpoints.
        lines: for people.
        numbers: the same for programs.
        warnings: what is wrong and does not keep the run from starting, a line each.

    Raises:
        UserError: as a run does.
    """

    def __init__(self, config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo) -> None:
        self._config, self._shape = config, shape
        self.tokens: int | None = None
        self.longest_row: int | None = None
        self.automatic: dict[str, Any] = {}
        self.lines: list[str] = []
        self.numbers: dict[str, Any] = {}
        self.warnings: list[str] = []
        training = [each.folder for each in weighted_folders(config)]
        evaluation = [named_folders((item,)).popitem()[1] for item in config.eval_data]
        self.lines += [
            f"{path} would be converted to shards first" for path in (*training, *evaluation) if _is_text(path)
        ]
        if any(map(_is_text, training)):
            self.lines.append("rows, steps and tokens are known when that is done")
        candidates = find_resume_points(config, agreement)
        self._rule = batching_rule(candidates, agreement)
        if config.write_ref_logps is not None:
            check_target(config)
        data = self._data = self._open(config, shape, agreement, model, training)
        self._evaluated: dict[str, Data] = {}
        shards = tuple(item for item, path in zip(config.eval_data, evaluation, strict=True) if not _is_text(path))
        if shards:
            opened = open_evaluation_sets(dataclasses.replace(config, eval_data=shards), shape, agreement, model)
            self._evaluated = opened
            self.warnings += [f"warning: {line}" for each in opened.values() for line in each.facts.warnings]
        self.resumed = self._open_newest(candidates)
        if config.resume_ckpt is not None:
            self.lines.append(f"goes on from {self.resumed.folder}" if self.resumed else "no checkpoint: starts afresh")
        if data is not None and config.write_ref_logps is None:
            self._count(data)
        elif data is not None:
            self.longest_row = data.facts.longest_row
            self.lines.append(f"writes {config.write_ref_logps}: {data.facts.num_rows:,} rows, forward only")

    def check_references(self, *, attention: str) -> None:
        """Raises:
        UserError: as a run, of reference log-probabilities of another model.
        """
        if self._data is not None:
            check_references(self._config, Alone(self._shape.mesh), self._data, self._evaluated, attention=attention)

    def _open_newest(self, candidates: list[Path]) -> CheckpointReader | None:
        """The first checkpoint whose index is intact. What the files hold is compared when the run reads it."""
        for folder in candidates[:-1]:
            try:
                return CheckpointReader(folder)
            except DamagedCheckpointError as error:
                self.warnings.append(f"warning: {error}; the checkpoint before it is taken")
        return CheckpointReader(candidates[-1]) if candidates else None

    def _open(
        self, config: TrainConfig, shape: RunShape, agreement: Agreement, model: ModelInfo, folders: list[Path]
    ) -> Data | None:
        """The training data; None where some of them are text, which has no rows yet."""
        shards = tuple(item for item, path in zip(config.train_data, folders, strict=True) if not _is_text(path))
        if not shards:
            return None
        given = dataclasses.replace(config, train_data=shards)
        data = open_training_data(given, shape, agreement, model, rule=self._rule)
        return data if len(shards) == len(folders) else None

    def _count(self, data: Data) -> None:
        config, facts = self._config, data.facts
        self.warnings += [f"warning: {line}" for line in facts.warnings]
        self.longest_row = facts.longest_row
        epochs = epoch_steps(config, data.index, data.share, data.parts)
        total, per_epoch = config.max_steps or epochs.total(config.num_train_epochs), epochs.counts[0]
        warmup = warmup_steps(config, total)
        if self.resumed is not None:
            self._check_resumed(self.resumed, data, total)
        done = self.resumed.state.step if self.resumed is not None else 0
        unwatched = Cadence(config, epochs=epochs, total_steps=total).unwatched(done)
        self.warnings += [f"warning: {line}" for line in unwatched]
        for line in filling_lines(config, epochs):
            (self.warnings if line.startswith("warning: ") else self.lines).append(line)
        budget = config.batch_size_tokens is not None
        rows_of_a_step = f"{facts.num_rows / per_epoch:.1f}" if budget else str(self._shape.global_batch)
        self.lines.append(
            f"{facts.num_rows:,} rows, {rows_of_a_step} a step, {per_epoch:,} steps an epoch, {total:,} steps"
            f" ({warmup} of warm-up)"
        )
        if facts.tokens is not None:
            self.tokens = int(facts.tokens * total / per_epoch)
        self.lines.append(
            f"about {self.tokens:,} tokens" if self.tokens else "the data set has no manifest: tokens unknown"
        )
        self.numbers = {
            "rows": facts.num_rows,
            "steps_per_epoch": per_epoch,
            "steps": total,
            "tokens": self.tokens,
            "filling": None if epochs.filling is None else dataclasses.asdict(epochs.filling),
        }
        if config.seq_len is None and facts.longest_row is not None:
            self.automatic["seq_len"] = facts.longest_row - 1
        if config.max_steps is None:
            self.automatic["max_steps"] = total
        if warmup != config.num_warmup_steps:
            self.automatic["num_warmup_steps"] = warmup

    def _check_resumed(self, reader: CheckpointReader, data: Data, total_steps: int) -> None:
        saved, record = reader.state, self._record(total_steps)
        now = dataclasses.replace(saved, fingerprint=data.facts.fingerprint, config=record)
        check_same_run(saved, now, forced=self._config.force_resume)
        check_steps_left(self._config, str(reader.folder), step=saved.step, total_steps=total_steps)

    def _record(self, total_steps: int) -> dict[str, Any]:
        return record_of_run(self._config, self._shape, total_steps, rule=self._rule)


def _is_text(path: Path) -> bool:
    """Whether a run would convert this first."""
    return path.is_file() and any(suffix in TEXT_SUFFIXES for suffix in path.suffixes)


def _whole_stage(config: TrainConfig, family: setup.FamilyInUse, plan: setup.StagePlan) -> PipelineStage:
    """All layers as `setup.build_stage` makes those of a stage, without memory for their weights.

    Raises:
        UserError: what the options choose of the model is not there.
    """
    [span] = spans_of([0, plan.spans[-1].end_layer])
    with torch.device("meta"):
        model = stage_class(family.model_class, span)._from_config(
            copy.deepcopy(family.config),
            dtype=DTYPES[config.precision],
            attn_implementation=family.attention,
        )
    tell = family.adapters.attach(model) if family.adapters is not None else None
    use_fp8(model, span, config.fp8)
    setup.attach(model, span, config)
    select_trainable(model, span, setup.chosen_parameters(config))
    stage = PipelineStage(
        model,
        span,
        ObjectiveInUse(CrossEntropy()),
        read=planes_of(config),
        is_frozen=family.adapters is not None,
        tell=tell,
    )
    parameter_groups(stage, config, attached_parameters(model, span))
    return stage
