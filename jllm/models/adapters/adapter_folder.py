"""The folder of adapters that a run leaves, whatever the number of stages, as peft lays it out.

Guarantees: the base is not in it; it is there completely or not at all, by its marker. Cost: the adapters of the whole
model in host memory, once, on the process that completes a folder.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from jllm.models.adapters.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights.saving import STAGE_METADATA
from jllm.models.weights.tensor_file import joined_file

PREFIX = "base_model.model."
"""What peft puts before the names of the model."""
_PART = "adapter-stage-{stage:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """The folder that a run with adapters leaves, and its checkpoints of adapters alone.

    Attributes:
        fields: what is stored beside the adapters.
        tensors: of a stage, by published names.
    """

    fields: Mapping[str, Any]
    tensors: Callable[[PreTrainedModel], dict[str, torch.Tensor]]
    marker: str = CONFIG_NAME
    replaces: str = "adapter_model*"

    def stage_files(self, model: PreTrainedModel, span: StageSpan) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """This stage's adapters under their published names, in host memory."""
        yield _PART.format(stage=span.index), {name: tensor.cpu() for name, tensor in self.tensors(model).items()}

    def size(self, model: PreTrainedModel) -> int:
        """Bytes of this stage's adapters."""
        return sum(tensor.nbytes for tensor in self.tensors(model).values())

    def write_companions(self, model: PreTrainedModel, folder: Path, *, chat_template: str | None) -> None:
        """What is no tensor: the configuration."""
        text = json.dumps(dict(self.fields), indent=2, sort_keys=True, default=str)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    def has_weights(self, folder: Path) -> bool:
        """Whether the adapters are there."""
        return (folder / WEIGHTS_NAME).is_file()

    def complete(self, folder: Path) -> None:
        """Put the parts of all stages into one file."""
        parts = sorted(folder.glob("adapter-stage-*.safetensors"))
        joined_file(parts, STAGE_METADATA).write(folder / WEIGHTS_NAME)
        for path in parts:
            path.unlink()
