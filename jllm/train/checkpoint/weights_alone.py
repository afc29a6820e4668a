"""The weights of a checkpoint without the state of its run: of which model they are, and their values.

Guarantees: what is read is what an evaluation of that run would have used, fp32 masters where they are asked for and
averages where the optimizer makes them. Nothing here needs DeepSpeed, or more than one process.
Cost: one tensor at a time.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from jllm.errors import UserError
from jllm.train.checkpoint.format import MASTER, WEIGHT, RunState
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.regions import Region
from jllm.train.optim.averaged import average

Z = "z"
"""The state that schedule-free optimizers average."""
ARCHITECTURE = "architecture"

NO_ARCHITECTURE = frozenset(
    {
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "is_encoder_decoder",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "use_cache",
    }
)
"""What a model's configuration says that changes nothing of what its weights compute; nor does what begins with _."""

_VERSION = "transformers_version"
_FORCE = ", or --force_resume where the shapes of all weights agree"


def architecture_of(config: PretrainedConfig) -> dict[str, Any]:
    """What decides what a model computes, as JSON values: its configuration without dtypes, paths and the like."""
    kept: dict[str, Any] = json.loads(json.dumps(_without(config.to_dict(), NO_ARCHITECTURE), default=str))
    return kept


def _without(value: Any, left_out: frozenset[str]) -> Any:
    if not isinstance(value, dict):
        return value
    kept = {str(key): item for key, item in value.items() if key not in left_out and not str(key).startswith("_")}
    return {key: _without(item, left_out) for key, item in kept.items()}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: item
        for part, inside in value.items()
        for key, item in _flat(inside, f"{name}.{part}" if name else part).items()
    }


def check_architecture(
    saved: RunState,
    now: dict[str, Any],
    option: str,
    *,
    way_out: str = ", or --force_resume where the shapes of all weights agree",
) -> None:
    """Raises:
    UserError: the checkpoint is of another architecture than `--model`.
    """
    then = _flat(saved.config.get(ARCHITECTURE, {}))
    given = _flat(now)
    # Another version of transformers may know more, or fewer, settings of the same model.
    names = then.keys() | given.keys() if then.get(_VERSION) == given.get(_VERSION) else then.keys() & given.keys()
    for name in sorted(names - {_VERSION}):
        if then.get(name) != given.get(name):
            raise UserError(
                f"--model has {name} {given.get(name)}, that of {option} had {then.get(name)}; give the same"
                f" model{way_out}"
            )


def misfit(reader: CheckpointReader, shapes: Mapping[str, tuple[int, ...]], *, has_adapters: bool) -> str | None:
    """The first parameter that a checkpoint does not have in its shape; None where it has all of them."""
    for name, needed in shapes.items():
        shape = reader.shape(WEIGHT, name)
        if shape != needed:
            found = "missing" if shape is None else list(shape)
            return f"{name} is {found}; --model{' with its adapters' * has_adapters} needs {list(needed)}"
    return None


def weight_alone(reader: CheckpointReader, name: str, region: Region, dtype: torch.dtype) -> Tensor:
    """The elements of a weight, flat: those of the fp32 master where it goes into fp32 or has to be averaged.

    Raises:
        UserError: some of them are in no file, or are not what was written.
    """
    point = reader.read(Z, name, region)
    is_exact = (dtype == torch.float32 or point is not None) and reader.shape(MASTER, name)
    values = reader.read(MASTER if is_exact else WEIGHT, name, region)
    assert values is not None, name
    if point is not None:
        return average(values, point, float(reader.state.config["adam_beta1"]))
    return values
