"""This process's stage of the model: which layers it has, how they are loaded, what is attached to them."""

import copy
import dataclasses
import functools
import socket
from typing import Any

from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.activation_checkpointing import Checkpointing, checkpoint_activations
from jllm.models.dropout import set_dropout
from jllm.models.embedding_noise import attach_noise
from jllm.models.families import check_block_mask, check_split
from jllm.models.kernels.available import prefer_cudnn
from jllm.models.pipeline.costs import Costs, Parameters, estimate_costs, state_bytes
from jllm.models.pipeline.partition import StageFacts, partition, stage_facts, stage_table
from jllm.models.pipeline.span import StageSpan, spans_of
from jllm.models.pipeline.stage import Objective, PipelineStage
from jllm.models.pipeline.timing import default_cache, measure_costs
from jllm.models.router_balance import RouterBalance, attach_router_balance, summary
from jllm.models.sequence_parallel.share import RunPlan, SequenceShare
from jllm.models.tensor_parallel.checks import check_tensor_parallel, sharers
from jllm.models.tensor_parallel.slicing import slice_stage
from jllm.models.trainable import ParameterChoice, attached_parameters, select_trainable
from jllm.models.weights.loading import init_stage, load_buffers, load_stage
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.source import ModelInfo, causal_class, model_info
from jllm.parallel.tensor.group import TensorGroup
from jllm.train.adapters import DTYPES, Adapters, find_adapters
from jllm.train.advice import PipelineAdvice
from jllm.train.attention import attention_of, kernel_of, share_of_rows
from jllm.train.compiling import Compiling, choose_compiling, compile_stage, keep_code_private
from jllm.train.config import TrainConfig
from jllm.train.data.open import planes_of
from jllm.train.distributed.agreement import Agreement, StepFacts
from jllm.train.fp8 import check_device, fp8_notes, use_fp8
from jllm.train.fused_loss import fused_loss_note, training_objective, wants_fused_loss
from jllm.train.objectives.cross_entropy import CrossEntropy
from jllm.train.objectives.objective import ObjectiveInUse
from jllm.train.optim.optimizers import KINDS
from jllm.train.optim.placeholder import add_placeholder
from jllm.train.options.optimizer import WITHOUT_MASTERS
from jllm.train.quantisation import find_quantisation, read_model_config
from jllm.train.shape import RunShape

ASSUMED_LENGTH = 2048
"""The sequence length of cost estimates where neither `--seq_len` nor the data say one."""


def read_model_info(config: TrainConfig) -> ModelInfo:
    """Sizes and dtype of `--model`, without loading weights.

    Raises:
        UserError: there is no such model, or its family does not keep documents apart as `--block_mask` asks.
    """
    assert config.model is not None
    if config.block_mask:
        try:
            check_block_mask(read_model_config(config))
        except UserError as error:
            raise UserError(
                f"pairs of a row must not see each other: {error}" if config.has_pairs else f"{error}"
            ) from None
    return model_info(
        config.model,
        trust_remote_code=config.trust_remote_code,
        with_weights=config.reads_weights,
        quantised=config.has_adapters,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FamilyInUse:
    """What `--model` is, before a weight is read.

    Attributes:
        config: its configuration.
        model_class: the family's own class.
        attention: the attention implementation that it gets.
        kernel: what computes that, with whole rows and with shared ones.
        runs: how processes share the tokens of rows; None where each has them whole.
        adapters: what is trained in its place; None where it trains itself.
        quantisation: what of it is held in 4 or 8 bits; None where nothing is.
        compiling: whether its decoder layers are compiled.
    """

    config: PretrainedConfig
    model_class: type[PreTrainedModel]
    attention: str
    kernel: str
    runs: RunPlan | None
    adapters: Adapters | None
    quantisation: QuantisationPlan | None
    compiling: Compiling


def find_family(config: TrainConfig) -> FamilyInUse:
    """The family of `--model`, and the attention it gets on this process's device.

    Raises:
        UserError: there is no such family, or it does not work with what the options ask for.
    """
    assert config.model is not None
    check_device(config)
    model_config = read_model_config(config)
    model_class = causal_class(model_config, folder=config.model, trust_remote_code=config.trust_remote_code)
    trained = copy.deepcopy(model_config)
    set_dropout(trained, config.dropout)
    check_tensor_parallel(trained, model_class, config.model_parallel_size, sharded_norms=config.sequence_sharded_norms)
    attention, runs = attention_of(config, trained, model_class)
    quantisation = find_quantisation(config, model_config, model_class)
    adapters = find_adapters(config, model_config, model_class, quantisation)
    return FamilyInUse(
        config=model_config,
        model_class=model_class,
        attention=attention,
        kernel=kernel_of(attention, runs, model_class),
        runs=runs,
        adapters=adapters,
        quantisation=quantisation,
        compiling=choose_compiling(
            config,
            model_class,
            device=get_accelerator().current_device_name(),
            attention=attention,
            quantised=quantisation,
        ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class StagePlan:
    """How the layers go to the stages.

    Attributes:
        spans: of the stages.
        table: for people: layers, parameters, memory and time share of each stage, and the bubble.
        stages: the same in numbers.
        warnings: for people, a line each: what makes stages wait, and what would help.
        flops_per_token: operations of a forward and a backward pass of the whole model.
        head_flops: those among them of the head.
        parameters: of the whole model, what is attached to it included.
        notes: for people, a line each: what has adapters, whether layers are compiled, how much trains where that is
            not everything, and of a stage that is built what multiplies in fp8 and whether the loss is fused with the
            head.
    """

    spans: list[StageSpan]
    table: str
    stages: list[StageFacts]
    warnings: tuple[str, ...]
    flops_per_token: float
    head_flops: float
    parameters: Parameters
    notes: tuple[str, ...]

    def flops_of(self, facts: StepFacts) -> float:
        """Operations for each token of a step: of pairs only the trained positions come to the head."""
        if not facts.pairs:
            return self.flops_per_token
        return self.flops_per_token - self.head_flops * (1 - facts.trained_tokens / max(facts.tokens, 1))


def plan_stages(
    config: TrainConfig,
    shape: RunShape,
    family: FamilyInUse,
    agreement: Agreement | None = None,
    *,
    longest_row: int | None = None,
) -> StagePlan:
    """Split the model by `--partition_method`.

    With `profile` the first process times layers, or reads the times that it kept, and tells the others, so that all
    of them split alike. Without `agreement` this process does it for itself.

    Args:
        longest_row: tokens of the data's longest row, where that is known.

    Raises:
        UserError: the model cannot be split, or not there.
    """
    known = [config.seq_len, longest_row - 1 if longest_row is not None else None]
    length = max(1, min((each for each in known if each is not None), default=ASSUMED_LENGTH))
    rows = shape.micro_batch
    if config.batch_size_tokens is not None:
        rows = max(1, config.batch_size_tokens // length)
    dtype, quantisation = DTYPES[config.precision], family.quantisation
    text = family.config.get_text_config(decoder=True)
    costs = estimate_costs(
        family.config,
        sequence_length=length,
        micro_batch_size=rows,
        dtype=dtype,
        # What attention alone keeps is not estimated: the table then says what the layers need without it.
        checkpoint_interval=0 if config.checkpoint_grad_attention else config.checkpoint_grad_interval,
        checkpoint_offload=config.checkpoint_grad_offload,
        state=dataclasses.replace(
            state_bytes(
                DTYPES[config.trained_precision],
                moments=KINDS[config.optimizer].moments,
                has_masters=config.optimizer not in WITHOUT_MASTERS,
                on_host=config.offload_optimizer,
                sharded_over=shape.mesh.copies if config.resolved_zero_stage else None,
            ),
            frozen=dtype.itemsize,
            quantised=quantisation.quantisation.bytes_of_a_parameter if quantisation is not None else 0.0,
        ),
        selection=chosen_parameters(config),
        attach=family.adapters.attach if family.adapters is not None else None,
        quantised=quantisation.parameters if quantisation is not None else (),
        family=family.model_class,
        is_whole=shape.mesh.pipe == 1,
        is_fused=wants_fused_loss(config),
        is_compiled=family.compiling.is_on,
        in_halves=config.split_dlayer and shape.mesh.pipe > 1,
        slices=shape.mesh.tensor,
        shares=shape.mesh.sequence,
        sharded_norms=config.sequence_sharded_norms,
    )
    operations = costs.operations
    if config.partition_method == "profile" and shape.mesh.pipe > 1:

        def measure() -> Costs:
            return measure_costs(
                family.config,
                costs,
                # Pairs cost what tokens do; and a batch that is made up has none.
                objective=ObjectiveInUse(CrossEntropy() if config.has_pairs else training_objective(config)),
                sequence_length=length,
                micro_batch_size=rows,
                dtype=dtype,
                device=get_accelerator().current_device_name(),
                attn_implementation=family.attention,
                checkpoint_interval=config.checkpoint_grad_interval,
                checkpoint_attention=config.checkpoint_grad_attention,
                family=family.model_class,
                is_compiled=family.compiling.is_on,
                cache=default_cache(),
                is_fused=wants_fused_loss(config),
                prepare=lambda model, span: use_fp8(model, span, config.fp8),
                prepared=config.fp8,
            )

        costs = measure() if agreement is None else agreement.from_first_reader(measure)
    boundaries = partition(
        # One stage has nothing to split, so nothing is timed for it.
        "fast" if shape.mesh.pipe == 1 and config.partition_method == "profile" else config.partition_method,
        config=family.config,
        num_stages=shape.mesh.pipe,
        micro_batches=shape.accumulation,
        costs=costs,
        overlaps=config.overlaps,
    )
    spans = spans_of(boundaries, in_halves=costs.in_halves)
    for span in spans:
        check_split(family.config, span)
    limit, parameters = _device_memory(), costs.model_parameters
    notes = family.adapters.said() if family.adapters is not None else []
    notes += quantisation.said() if quantisation is not None else []
    notes.append(family.compiling.said)
    notes += family.runs.said(length) if family.runs is not None else []
    if (slices := shape.mesh.tensor) > 1:
        said = f"{slices} processes share each stage; the table is of one of them"
        notes.append(f"{said}; {costs.share_of_whole(slices):.1%} of the weights are whole on each")
    if parameters.trained < parameters.total:
        share = parameters.trained / parameters.total
        notes.append(f"{parameters.trained:,} of {parameters.total:,} parameters train ({share:.2%})")
    return StagePlan(
        spans=spans,
        table=stage_table(
            costs, boundaries, micro_batches=shape.accumulation, memory_limit=limit, overlaps=config.overlaps
        ),
        stages=stage_facts(costs, boundaries, micro_batches=shape.accumulation, overlaps=config.overlaps),
        warnings=PipelineAdvice(config, shape, family.config, costs, boundaries, memory_limit=limit).warnings(),
        flops_per_token=operations / (length * rows),
        head_flops=6.0 * text.hidden_size * text.vocab_size,
        parameters=parameters,
        notes=tuple(notes),
    )


def _device_memory() -> float | None:
    """Bytes of this process's device; None on CPU, whose memory all processes share."""
    accelerator = get_accelerator()
    return None if accelerator.device_name() == "cpu" else float(accelerator.total_memory())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Built:
    """This process's stage and what was attached to it.

    Attributes:
        stage: on its device.
        plan: for all stages.
        checkpointing: the switch of activation checkpointing; None where it is off.
        routers: what watches the routers of a mixture of experts; None where nothing does.
        attached: the names of what is attached to the model, on all stages.
        adapters: those of the run; None where the model itself trains.
        kernel: that of the model's attention.
    """

    stage: PipelineStage
    plan: StagePlan
    checkpointing: Checkpointing | None
    routers: RouterBalance | None
    attached: frozenset[str]
    adapters: Adapters | None
    kernel: str

    def router_record(self, agreement: Agreement) -> dict[str, Any]:
        """What the record of a step has of the routers, on all processes; nothing where nothing watches them."""
        return {} if self.routers is None else summary(agreement.gather(self.routers.take()), agreement.mesh)


def build_stage(
    config: TrainConfig, shape: RunShape, agreement: Agreement, objective: Objective, *, longest_row: int | None = None
) -> Built:
    """This process's stage of the model, on its device, with what the options ask for; a last stage computes
    `objective`. `longest_row` as in `plan_stages`."""
    assert config.model is not None
    keep_code_private()
    prefer_cudnn()
    family = find_family(config)
    plan = plan_stages(config, shape, family, agreement, longest_row=longest_row)
    span = plan.spans[agreement.place.pipe]
    device, dtype = get_accelerator().current_device_name(), DTYPES[config.precision]
    cut, group = None, None
    if shape.mesh.tensor > 1:
        shared = sharers(family.config, shape.mesh.tensor)
        group = TensorGroup.make(shape.mesh, agreement.rank, sharers=shared)
        cut = functools.partial(slice_stage, group=group, sharded_norms=config.sequence_sharded_norms)
    if not config.reads_weights:
        model = init_stage(
            family.config,
            span,
            dtype=dtype,
            seed=config.seed,
            device=device,
            attn_implementation=family.attention,
            family=family.model_class,
            dropout=config.dropout,
        )
        if not config.init:
            load_buffers(model, config.model)
        if cut is not None:
            cut(model)
    else:
        model = load_stage(
            config.model,
            span,
            dtype=dtype,
            # A device may have room for slices only. What is quantised, on the device, is cut by itself.
            device=device if cut is None or family.quantisation is not None else "cpu",
            attn_implementation=family.attention,
            trust_remote_code=config.trust_remote_code,
            names_unused=agreement.place.is_first,
            dropout=config.dropout,
            quantisation=family.quantisation,
            cut=cut,
        )
        if cut is not None:
            model.to(device)  # type: ignore[arg-type]
    tell = family.adapters.attach(model) if family.adapters is not None else None
    if group is not None and family.adapters is not None:
        from jllm.models.tensor_parallel.adapters import slice_adapters  # here: peft may not be there

        slice_adapters(model, group)
    use_fp8(model, span, config.fp8)
    if family.compiling.is_on:
        compile_stage(model, span, config, shape, agreement, longest_row, family.runs)
    share = share_of_rows(family.runs, agreement)
    checkpointing, routers = attach(model, span, config, is_compiled=family.compiling.is_on, share=share)
    attached = {name for each in agreement.gather(attached_parameters(model, span)) for name in each}
    select_trainable(model, span, chosen_parameters(config), attached=attached)
    stage = PipelineStage(
        model,
        span,
        objective,
        read=planes_of(config),
        is_frozen=family.adapters is not None or config.write_ref_logps is not None,
        tell=tell,
        are_rows_whole=not config.block_mask,
        share=share,
    )
    hosts = agreement.gather(socket.gethostname())
    places = shape.mesh.table(hosts) if shape.mesh.tensor * shape.mesh.sequence > 1 or len(set(hosts)) > 1 else []
    notes = fp8_notes(config, agreement, model, span, is_compiled=family.compiling.is_on)
    notes.append(fused_loss_note(config, is_plain=any(agreement.gather(stage.plain_head is not None))))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        add_placeholder(stage, DTYPES[config.trained_precision], device)
    return Built(
        stage=stage,
        plan=dataclasses.replace(plan, notes=(*places, *plan.notes, *notes)),
        checkpointing=checkpointing,
        routers=routers,
        attached=frozenset(attached),
        adapters=family.adapters,
        kernel=family.kernel,
    )


def attach(
    model: PreTrainedModel,
    span: StageSpan,
    config: TrainConfig,
    *,
    is_compiled: bool = False,
    share: SequenceShare | None = None,
) -> tuple[Checkpointing | None, RouterBalance | None]:
    """Give a loaded stage what the options ask of its model: recomputation, noise, balanced routers.

    `is_compiled` says whether its layers were compiled before. Which parameters train is decided after all this, over
    what is there then.

    Raises:
        UserError: what the options ask for is not in the model.
    """
    checkpointing = None
    if config.checkpoint_grad_interval or config.checkpoint_grad_attention:
        checkpointing = checkpoint_activations(
            model,
            span,
            interval=config.checkpoint_grad_interval or 1,
            attention_only=config.checkpoint_grad_attention,
            offload=config.checkpoint_grad_offload,
            is_compiled=is_compiled,
        )
    if config.neftune_alpha is not None:
        attach_noise(model, span, config.neftune_alpha)
    routers = None
    if config.router_aux_loss_coef is not None:
        group = None if share is None else share.group
        routers = attach_router_balance(model, span, config.router_aux_loss_coef, group=group)
    return checkpointing, routers


def chosen_parameters(config: TrainConfig) -> ParameterChoice:
    """What the options say about which parameters train."""
    return ParameterChoice(
        target_modules=config.target_modules,
        frozen_modules=config.frozen_modules,
        layers_to_transform=config.layers_to_transform,
        attached_only=config.has_adapters,
        nothing=config.write_ref_logps is not None,
    )
