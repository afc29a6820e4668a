"""A peft folder: `adapter_config.json` and `adapter_model.safetensors`, whatever the number of stages.

Guarantees: peft loads what is written into the places it came from; the base is not in it. What is read fits the
model, every tensor of it.
Cost: the adapters of the whole model in host memory, once, on the process that completes a folder and on each that
reads one.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from transformers import PretrainedConfig, PreTrainedModel

from jllm.errors import UserError
from jllm.models.adapters.adapter_files import CONFIG_NAME, read_fields, read_weights
from jllm.models.adapters.adapter_folder import PREFIX, AdapterFolder
from jllm.models.adapters.lora import attach_lora, is_adapter
from jllm.models.adapters.lora_plan import ADAPTER, LoraPlan
from jllm.models.pipeline.carving import plain_name
from jllm.models.weights.source import bare_model

_UNSUPPORTED = {
    "bias": "none",
    "layer_replication": None,
    "trainable_token_indices": None,
    "lora_bias": False,
    "alora_invocation_tokens": None,
    "megatron_config": None,
    "use_qalora": False,
    "target_modules_to_tie": None,
    "ensure_weight_tying": False,
    "exclude_modules": None,
}
"""Settings of an adapter that the trainer does not have → the value that turns them off."""


def lora_folder(config: LoraConfig) -> AdapterFolder:
    """What a run with LoRA adapters leaves: `config` and the adapters."""
    fields = config.to_dict()
    named = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    return AdapterFolder(fields=named | {"inference_mode": True}, tensors=adapter_tensors)


def adapter_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Published name → tensor, of what is attached to a stage."""
    return {name: parameter.detach().contiguous() for name, parameter in _attached(model).items()}


def stored_parameters(model: PreTrainedModel) -> list[tuple[str, str, torch.nn.Parameter]]:
    """What is attached to a stage: the name in peft's file, that in checkpoints, and the parameter."""
    attached = [
        (plain_name(name), parameter)
        for name, parameter in model.named_parameters()
        if is_adapter(name) or ".modules_to_save." in name
    ]
    return [(PREFIX + name.replace(".modules_to_save.", "."), name, parameter) for name, parameter in attached]


def _attached(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    return {published: parameter for published, _, parameter in stored_parameters(model)}


def read_adapter_config(folder: Path, *, user: str = "the trainer", allowed: Collection[str] = ()) -> LoraConfig:
    """The configuration of an adapter.

    Args:
        folder: of it.
        user: who reads it, for messages.
        allowed: settings that this user has, though the trainer has not.

    Raises:
        UserError: there is none, or one of another kind, or with settings that the user does not have.
    """
    return adapter_config(read_fields(folder), folder, user=user, allowed=allowed)


def adapter_config(
    fields: Mapping[str, Any], folder: Path, *, user: str = "the trainer", allowed: Collection[str] = ()
) -> LoraConfig:
    """The same of what the file in `folder` says, or said."""
    for name, off in _UNSUPPORTED.items():
        if name not in allowed and fields.get(name, off) not in (off, None, [], {}):
            raise UserError(f"--lora {folder}: its {name} is {fields[name]!r}, which {user} does not have")
    known = LoraConfig.__dataclass_fields__
    try:
        return LoraConfig(**{name: value for name, value in fields.items() if name in known and name != "peft_type"})
    except (TypeError, ValueError) as error:
        raise UserError(f"--lora {folder}: {CONFIG_NAME}: {' '.join(str(error).split())[:300]}; correct it") from None


def load_adapter(
    model: PreTrainedModel, folder: Path, config: LoraConfig, *, origin: PretrainedConfig, family: type[PreTrainedModel]
) -> None:
    """Take the values of an adapter that has been checked into a stage that has its layers.

    Raises:
        UserError: values that are not finite, or a copy of the base's own weights that differs from the base.
    """
    tensors = read_tensors_of(folder, config, bare_model(origin, family, dtype=torch.float32))
    with torch.no_grad():
        for name, parameter in _attached(model).items():
            if not torch.isfinite(tensors[name]).all():
                raise UserError(
                    f"--lora {folder}: {name} has values that are not finite; give an adapter that is whole"
                )
            parameter.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        copied = tensors.get(PREFIX + name) if _is_of_base(name) else None
        if copied is not None and not torch.equal(copied.to(parameter.device, parameter.dtype), parameter):
            raise UserError(
                f"--lora {folder}: it has {name} itself, and another one than --model; give the model that it was"
                " trained on"
            )


def check_adapter(folder: Path, plan: LoraPlan, *, origin: PretrainedConfig, family: type[PreTrainedModel]) -> None:
    """See to it that an adapter has the tensors of its plan, and no others but biases where its configuration says so.

    Raises:
        UserError: one is missing, has another shape, or has no place in the model.
    """
    whole = bare_model(origin, family, dtype=torch.float32)
    stored = read_tensors_of(folder, plan.config, whole)
    with_layers = bare_model(origin, family, dtype=torch.float32)
    attach_lora(with_layers, plan, seed=0, dtype=torch.float32)
    needed = {name: list(tensor.shape) for name, tensor in adapter_tensors(with_layers).items()}
    if plan.config.bias != "none":
        biases = {
            PREFIX + name: list(value.shape) for name, value in whole.named_parameters() if name.endswith(".bias")
        }
        needed |= {name: biases[base] for name in stored if (base := name_in_base(name)) in biases}
    # Beside an adapter on the embedding or the head peft stores the base's own tensor.
    for name in sorted(needed.keys() | {name for name in stored if not _is_of_base(name)}):
        shape = list(stored[name].shape) if name in stored else None
        if name not in needed:
            raise UserError(f"--lora {folder}: {name} has no place in --model; give an adapter of this model")
        if shape != needed[name]:
            raise UserError(
                f"--lora {folder}: {name} is {'missing' if shape is None else shape}, --model needs {needed[name]};"
                " give an adapter of this model"
            )


def read_tensors_of(folder: Path, config: LoraConfig, whole: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, by the names that peft stores them under now.

    Names of older layouts (an expert each) are brought into the present one by peft, on the whole model without memory.
    """
    return convert_peft_adapter_state_dict_for_transformers(whole, config, read_weights(folder), ADAPTER)


def name_in_base(name: str) -> str:
    """The name of what an adapter stores of the base itself, a bias or a matrix, without what is put around it."""
    return name.replace(".base_layer.", ".")


def _is_of_base(name: str) -> bool:
    return ".base_layer." in name and not is_adapter(name)
