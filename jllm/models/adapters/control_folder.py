"""The folder of control adapters: `adapter_config.json` of type CONTROL, `adapter_model.safetensors`.

Of each layer that has an adapter it holds Q [width, rank] and s [rank] (`jllm.models.adapters.control`), as
`base_model.model.<layer>.control_Q` and `control_S`, fp32. peft does not know this type; `jllm adapter control_to_lora`
makes a LoRA adapter of it.
"""

import torch
from transformers import PreTrainedModel

from jllm.models.adapters.adapter_folder import PREFIX, AdapterFolder
from jllm.models.adapters.control import DIRECTIONS, STRENGTHS

KIND = "CONTROL"
"""What such a folder has for `peft_type`."""


def control_folder(*, rank: int, layers: frozenset[int], base: str | None) -> AdapterFolder:
    """What a run with control adapters leaves.

    Args:
        rank: of the adapters.
        layers: numbers of the decoder layers that have one.
        base: the model's name, for people.
    """
    fields = {
        "peft_type": KIND,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "layers_to_transform": sorted(layers),
    }
    return AdapterFolder(fields=fields, tensors=control_tensors)


def control_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Published name → tensor, of the control adapters of a stage."""
    return {
        PREFIX + name: parameter.detach().contiguous()
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[2] in (DIRECTIONS, STRENGTHS)
    }
