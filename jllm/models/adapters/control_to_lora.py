"""`jllm adapter control_to_lora`: control adapters of one class as a LoRA adapter, and how far the two are apart.

A layer with a control adapter adds (I + Q diag(l) Qᵀ) times what it would add. Where attention and the feed-forward
network read the same input (parallel residuals), that is the same factor before both: a LoRA with B = Q diag(l) and
A = QᵀW on the map that ends each of them, exactly. Where the network reads what attention wrote, no LoRA is the same;
one on the network's last map alone, and one on both, are tried, and the nearer one is taken.

Guarantees: the distance is measured on the model itself: root mean square of the difference of its logits, beside how
far the control adapters moved them. Families whose layers put norms behind their parts are refused.
Cost: the whole model in fp32, and some passes over `TOKENS` random ids.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm import atomic
from jllm.errors import UserError
from jllm.models.adapters.adapter_files import WEIGHTS_NAME, read_fields, read_weights
from jllm.models.adapters.adapter_folder import PREFIX
from jllm.models.adapters.control import DIRECTIONS, STRENGTHS, ControlClasses, attach_control
from jllm.models.adapters.control_folder import KIND
from jllm.models.adapters.peft_folder import lora_folder
from jllm.models.pipeline.bundle import CONTROL_CLASS
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import spans_of
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.finite import check_finite
from jllm.models.weights.loading import load_stage
from jllm.models.weights.saving import STAGE_METADATA
from jllm.models.weights.source import read_config
from jllm.models.weights.tensor_file import tensor_file

TOKENS = (4, 64)
ATTENTION, NETWORK = "self_attn.o_proj", "mlp.down_proj"
_BEFORE_ATTENTION, _BEFORE_NETWORK = "input_layernorm", "post_attention_layernorm"
_PARTS = {"self_attn", "mlp", _BEFORE_ATTENTION, _BEFORE_NETWORK}


@dataclass(frozen=True, kw_only=True)
class AsLora:
    """What came of it.

    Attributes:
        targets: the maps that have an adapter.
        moved: root mean square of what the control adapters change of the logits.
        error: the same of the difference between them and the LoRA.
    """

    targets: tuple[str, ...]
    moved: float
    error: float


def control_to_lora(adapter: Path, base: Path, output: Path, *, control_class: int = 1) -> AsLora:
    """Write `output`, a peft folder.

    Args:
        adapter: the folder of control adapters.
        base: the Hugging Face folder of their model.
        output: a new folder.
        control_class: 1 or -1.

    Raises:
        UserError: the adapters do not fit the model, or its family is one that no LoRA is near to.
    """
    fields = read_fields(adapter, kinds=(KIND,), option="")
    stored = {name.removeprefix(PREFIX): tensor.float() for name, tensor in read_weights(adapter).items()}
    check_finite(stored.items(), adapter)
    config = read_config(base)
    [span] = spans_of([0, count_layers(config)])
    model = load_stage(base, span, dtype=torch.float32).eval()
    prefix, rank = structure_of(model).layers, int(fields.get("r", 0))
    # A layer that the model has not is refused with the tensors that have no place.
    found = range(count_layers(config))
    numbers = [number for number in found if any(name.startswith(f"{prefix}.{number}.") for name in stored)]
    layers = {f"{prefix}.{number}": number for number in numbers}
    width = int(config.get_text_config(decoder=True).hidden_size)
    _check_fits(adapter, model, stored, layers, (width, rank))
    classes = attach_control(model, rank=rank, prefix=prefix, layers=numbers, width=width, seed=0, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in stored.items():
            model.get_parameter(name).copy_(tensor)
        return _converted(model, stored, layers, classes, output, control_class=control_class, base=str(base))


def _check_fits(
    adapter: Path, model: PreTrainedModel, stored: dict[str, Tensor], layers: dict[str, int], shape: tuple[int, int]
) -> None:
    """Raises:
    UserError: a tensor is missing or has another shape, or a layer is not made as it has to be.
    """
    needed = {f"{layer}.{leaf}": own for layer in layers for leaf, own in ((DIRECTIONS, shape), (STRENGTHS, shape[1:]))}
    for name in sorted(needed.keys() | stored.keys()):
        found = tuple(stored[name].shape) if name in stored else None
        if found != needed.get(name):
            what = "missing" if found is None else f"{list(found)}"
            what += f", --model needs {list(needed[name])}" if name in needed else " and has no place in --model"
            raise UserError(f"{adapter}: {name} is {what}; give the model that the adapters were trained on")
    known = dict(model.named_modules())
    for layer in layers:
        parts = {name for name, part in known[layer].named_children() if any(True for _ in part.parameters())}
        ends = [known.get(f"{layer}.{end}") for end in (ATTENTION, NETWORK)]
        are_plain = all(isinstance(end, nn.Linear) and end.bias is None for end in ends)
        if not parts <= _PARTS or _BEFORE_ATTENTION not in parts or not are_plain:
            others = ", ".join(sorted(parts - _PARTS)) or "experts, or biases behind them"
            raise UserError(
                f"a layer of {model.config.model_type!r} has other parts than a norm before attention and one before"
                f" its network ({others}); no LoRA is near to its control adapters: use them as they are"
            )


def _converted(
    model: PreTrainedModel,
    stored: dict[str, Tensor],
    layers: dict[str, int],
    classes: ControlClasses,
    output: Path,
    *,
    control_class: int,
    base: str,
) -> AsLora:
    """Measure, and write what is nearest."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config(decoder=True).vocab_size, TOKENS, generator=generator)

    def logits(kind: int) -> Tensor:
        classes.tell({CONTROL_CLASS: torch.full(TOKENS, kind)})
        found: Any = model(input_ids=ids, use_cache=False)
        return found.logits.float()  # type: ignore[no-any-return]

    def factors(end: str) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for layer in layers:
            directions, strengths = stored[f"{layer}.{DIRECTIONS}"], stored[f"{layer}.{STRENGTHS}"]
            weight = model.get_parameter(f"{layer}.{end}.weight")
            found[f"{layer}.{end}"] = (directions.mT @ weight, directions * torch.expm1(control_class * strengths))
        return found

    def add(pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (first, second) in pairs.items():
            model.get_parameter(f"{name}.weight").add_(second @ first)

    plain, wanted = logits(0), logits(control_class)
    network, attention = factors(NETWORK), factors(ATTENTION)
    add(network)
    tried = [(_distance(logits(0), wanted), network)]
    add(attention)
    tried.append((_distance(logits(0), wanted), network | attention))
    error, pairs = min(tried, key=lambda each: each[0])
    rank = next(iter(pairs.values()))[0].shape[0]
    targets = tuple(sorted({name.rpartition(".")[2] for name in pairs}))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=sorted(pairs), task_type="CAUSAL_LM", base_model_name_or_path=base
    )
    tensors: dict[str, Tensor] = {}
    for name, (first, second) in sorted(pairs.items()):
        tensors |= {f"{PREFIX}{name}.lora_A.weight": first, f"{PREFIX}{name}.lora_B.weight": second}
    with atomic.new_folder(output) as folder:
        tensor_file(tensors, STAGE_METADATA, copy=False).write(folder / WEIGHTS_NAME)
        lora_folder(config).write_companions(model, folder, chat_template=None)
    return AsLora(targets=targets, moved=_distance(wanted, plain), error=error)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean().sqrt())
