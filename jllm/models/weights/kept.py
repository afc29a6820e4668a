"""Which dtype each tensor of an exported model has: that of the published file, and where there is none, the family's.

Families keep some tensors in fp32 whatever the rest is in: biases that choose experts, some norms and gates
(transformers' `_keep_in_fp32_modules_strict`). Publishers do so for more. What a run exports is loaded as the published
files are, so each tensor goes back to the dtype that it came in.

Cost: the headers of the published files, once.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from jllm.errors import UserError
from jllm.models.weights.source import FLOATING, read_header, weight_files


class KeptDtypes:
    """The dtypes of a model's tensors, by their published names.

    Args:
        model: of the family, on any stage.
        dtype: of what is said nothing of; None leaves a tensor as it is.
        source: the folder that the weights came from; None where they did not.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None, source: Path | None = None) -> None:
        self._dtype = dtype
        self._published = {} if source is None else _floating(source)
        kept = {*(model._keep_in_fp32_modules_strict or ())}
        if dtype == torch.float16:
            kept |= {*(model._keep_in_fp32_modules or ())}
        # As transformers looks for them: a part of the name in the model, between dots.
        self._fp32 = re.compile("|".join(rf"(?:^|\.){each}(?:$|\.)" for each in sorted(kept))) if kept else None
        self._model = model
        # Not the model's own dtype, which is that of a stage's first parameter.
        self._is_low = any(parameter.dtype == dtype for parameter in model.parameters())
        self._names: frozenset[str] = frozenset()

    def look_at(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Learn which of these tensors, by their names in the model, the family keeps, and how those are published."""
        if self._fp32 is None or self._dtype not in (torch.float16, torch.bfloat16):
            return
        kept = {name: tensor for name, tensor in tensors.items() if self._fp32.search(name)}
        self._names = frozenset(revert_weight_conversion(self._model, kept)) if kept else frozenset()

    def in_memory(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype that the model itself has a tensor in, by its own name, where it is loaded as `dtype`."""
        is_kept = self._fp32 is not None and dtype in (torch.float16, torch.bfloat16) and self._fp32.search(name)
        return torch.float32 if is_kept else dtype

    def of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        """The dtype in which a tensor is saved."""
        if self._dtype is None or not tensor.is_floating_point():
            return tensor.dtype
        if name in self._published:
            return self._published[name]
        is_own = tensor.dtype == torch.float32 and self._is_low  # a layer that asks for it itself
        return torch.float32 if name in self._names or is_own else self._dtype


def _floating(source: Path) -> dict[str, torch.dtype]:
    try:
        files = weight_files(source)
    except UserError:  # a configuration alone: the weights were random
        return {}
    entries = ((name, FLOATING.get(entry["dtype"])) for path in files for name, entry in read_header(path).items())
    return {name: dtype for name, dtype in entries if dtype is not None}
