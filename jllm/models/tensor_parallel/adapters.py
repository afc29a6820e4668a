"""LoRA beside slices: each adapter is cut as the map that it is beside.

Beside a column-parallel map the second matrix has the same outputs, and the first is whole; beside a row-parallel one
the first has the same inputs, and the second is whole. What lies between the two, rank numbers a token, is what the
slices have in common, so that sums over them are small and every whole matrix has its whole gradient on each rank.
Beside a map that is whole on every rank both are whole.

Attach adapters to a stage that is cut, then call `slice_adapters`.
"""

from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from jllm.models.adapters.adapter_folder import AdapterFolder
from jllm.models.adapters.lora_plan import ADAPTER
from jllm.models.adapters.peft_folder import stored_parameters
from jllm.models.pipeline.span import StageSpan
from jllm.models.tensor_parallel.marks import mark_repeats, mark_shared, partial_gradient
from jllm.models.tensor_parallel.saving import SlicedFile, SlicedTensor
from jllm.parallel.tensor.group import SharedCopies, TensorGroup
from jllm.parallel.tensor.layers import ColumnParallelLinear, RowParallelLinear, move_copies, take_columns, take_rows
from jllm.parallel.tensor.slices import slice_of, whole_shape


def slice_adapters(model: PreTrainedModel, group: TensorGroup) -> None:
    """Have the adapters of a stage compute with the slices of what they are beside."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        base = module.get_base_layer()
        first, second = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        weight = base.weight
        assert isinstance(weight, nn.Parameter)
        assert isinstance(second.weight, nn.Parameter)
        held = slice_of(weight)
        if held is None:
            move_copies(base, module)
        elif isinstance(base, RowParallelLinear):
            take_rows(first, held.ranges, held.shape[1], group)
        else:
            assert isinstance(base, ColumnParallelLinear)
            take_columns(second, held.ranges, held.shape[0], SharedCopies(group))
            if (handle := partial_gradient(weight)) is not None:
                mark_shared(second.weight, handle)
    mark_repeats(model, group)


def sliced_adapter_files(kind: AdapterFolder, model: PreTrainedModel, span: StageSpan) -> list[SlicedFile]:
    """The files of a stage's adapters, that its slices write together."""
    parameters = {published: parameter for published, _, parameter in stored_parameters(model)}
    return [
        SlicedFile(
            name=file_name,
            tensors=[
                SlicedTensor(
                    name=name,
                    dtype=tensor.dtype,
                    shape=whole_shape(parameters[name]),
                    held=tensor,
                    place=slice_of(parameters[name]),
                )
                for name, tensor in tensors.items()
            ],
        )
        for file_name, tensors in kind.stage_files(model, span)
    ]
