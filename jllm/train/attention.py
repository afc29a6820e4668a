"""The attention of a run's model: its kernel, or that of processes that share the tokens of rows."""

from deepspeed.accelerator import get_accelerator
from transformers import PretrainedConfig, PreTrainedModel

from jllm.models.attention import VARLEN, choose_attention, takes_sdpa
from jllm.models.sequence_parallel.attention import NAME
from jllm.models.sequence_parallel.checks import check_sequence_parallel, plan_runs
from jllm.models.sequence_parallel.seen import takes_runs
from jllm.models.sequence_parallel.share import RunPlan, SequenceShare
from jllm.parallel.sequence.group import SequenceGroup
from jllm.train.adapters import DTYPES
from jllm.train.config import TrainConfig
from jllm.train.distributed.agreement import Agreement


def attention_of(
    config: TrainConfig, model: PretrainedConfig, family: type[PreTrainedModel]
) -> tuple[str, RunPlan | None]:
    """The attention implementation that a model gets on this process's device, and how processes share the tokens of
    rows; None where each has them whole.

    Args:
        config: the options.
        model: the model's configuration, with the dropout of the run.
        family: its class.

    Raises:
        UserError: it does not work with what the options ask for.
    """
    device, size = get_accelerator().current_device_name(), config.sequence_parallel_size
    text = model.get_text_config(decoder=True)
    if size == 1:
        return choose_attention(
            family,
            device=device,
            dtype=DTYPES[config.precision],
            wanted=config.attn_implementation,
            dropout=getattr(text, "attention_dropout", None) or 0.0,
            head_size=vars(text).get("head_dim"),
        ), None
    check_sequence_parallel(model, family, size)
    return NAME, plan_runs(
        model,
        family,
        size,
        slices=config.model_parallel_size,
        mode=config.sequence_parallel_mode,
        by_lengths=takes_runs(device, DTYPES[config.precision]),
    )


def kernel_of(attention: str, plan: RunPlan | None, family: type[PreTrainedModel]) -> str:
    """The kernel that computes the attention: under `plan` the one that has the numbers of runs of rows, by the name
    that it has where rows are whole."""
    if plan is None:
        return attention
    whole = "sdpa" if takes_sdpa(family) else "eager"
    return VARLEN if plan.by_lengths else whole


def share_of_rows(plan: RunPlan | None, agreement: Agreement) -> SequenceShare | None:
    """What this process has of rows; every process calls it. None where it has them whole."""
    return None if plan is None else SequenceShare(plan=plan, group=SequenceGroup.make(agreement.mesh, agreement.rank))
