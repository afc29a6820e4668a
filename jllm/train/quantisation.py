"""What the options and the folder say about 4 and 8 bits: the plan of a run, and what it is told from another by."""

import functools
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.tensor_parallel.checks import sharers
from jllm.models.tensor_parallel.slicing import slice_stage
from jllm.models.weights.loading import stage_slices
from jllm.models.weights.quantisation import (
    Quantisation,
    QuantisationPlan,
    check_slices,
    plan_quantisation,
    stored_quantisation,
)
from jllm.models.weights.source import read_config
from jllm.parallel.tensor.group import TensorGroup
from jllm.train.config import TrainConfig


def read_model_config(config: TrainConfig) -> PretrainedConfig:
    """The configuration of `--model`, which may be quantised where adapters are trained.

    Raises:
        UserError: as `jllm.models.weights.source.read_config`.
    """
    assert config.model is not None
    return read_config(config.model, trust_remote_code=config.trust_remote_code, quantised=config.has_adapters)


def chosen_quantisation(config: TrainConfig) -> Quantisation | None:
    """How the weights of the model are held; None where they are not quantised.

    Raises:
        UserError: the folder is quantised already, in another way than the options ask for, or not read at all.
    """
    assert config.model is not None
    stored = stored_quantisation(config.model) if config.has_adapters else None
    if stored is not None and config.init:
        raise UserError(
            f"--init makes random weights, and {config.model} has its own in {stored}; drop it, or give the folder of"
            " the model in bf16"
        )
    if config.load_in is None:
        return stored
    wanted = Quantisation(
        bits=4 if config.load_in_4bit else 8,
        kind=config.bnb_4bit_quant_type,
        double=config.bnb_4bit_use_double_quant,
        skipped=config.skip_quant,
    )
    if stored is not None and (str(stored) != str(wanted) or wanted.skipped is not None):
        given = f"--{config.load_in}" if str(stored) != str(wanted) else f"--skip_quant {wanted.skipped!r}"
        raise UserError(
            f"{given}: {config.model} is quantised already, in {stored}, and is taken as it is; drop"
            f" {given.split()[0]}, or give the folder of the model in bf16"
        )
    return stored or wanted


def find_quantisation(
    config: TrainConfig, origin: PretrainedConfig, family: type[PreTrainedModel]
) -> QuantisationPlan | None:
    """What of the model is quantised; None where nothing is.

    Raises:
        UserError: as `chosen_quantisation`, `check_cut`, and `plan_quantisation` of
            `jllm.models.weights.quantisation`.
    """
    chosen = chosen_quantisation(config)
    assert config.model is not None
    if chosen is None:
        return None
    plan = plan_quantisation(origin, family, chosen, folder=config.model)
    if config.model_parallel_size > 1:
        check_cut(plan, origin, family, config.model_parallel_size)
    return plan


def check_cut(plan: QuantisationPlan, origin: PretrainedConfig, family: type[PreTrainedModel], size: int) -> None:
    """See to it that so many slices have the whole weights' values.

    Raises:
        UserError: as `check_slices` of `jllm.models.weights.quantisation`.
    """
    [whole] = spans_of([0, count_layers(origin)])
    first = TensorGroup(rank=0, size=size, handle=None, sharers=sharers(origin, size))
    slices = stage_slices(origin, family, whole, functools.partial(slice_stage, group=first))
    check_slices(plan, slices, f"--model_parallel_size {size}")


def quantisation_record(config: TrainConfig) -> dict[str, Any] | None:
    """What a checkpoint keeps of it, as JSON values: adapters are trained beside these very weights."""
    chosen = chosen_quantisation(config)
    if chosen is None:
        return None
    return {"how": str(chosen), "skip_quant": chosen.skipped, "is_stored": chosen.is_stored}


def described(record: dict[str, Any] | None) -> str:
    """Such a record for people."""
    if record is None:
        return "not quantised"
    without = f", without {record['skip_quant']}" if record["skip_quant"] else ""
    stored = ", as its folder has it," if record["is_stored"] else ""
    return f"in {record['how']}{without}{stored}"
