"""What one decoder layer costs for each token, from the shapes of its parameters and its configuration.

Operations: two for each weight that a token is multiplied with, experts as far as they are chosen, and the scores of
attention. Bytes: what each product needs for its backward pass. Where several processes share a layer (tensor
parallelism), `Parts` says into how many slices a parameter is cut, and costs are those of one process.
"""

from collections.abc import Callable, Collection

from torch import nn
from transformers import PretrainedConfig

from jllm.models.pipeline.carving import plain_name

_LORA = ".lora_"
"""What the names of adapters have after that of the module which they are beside."""
Parts = Callable[[nn.Parameter], int]
"""Into how many slices a parameter is cut."""


def in_one_part(parameter: nn.Parameter) -> int:
    """The `Parts` of a model that nothing is cut of."""
    return 1


def weights_used(
    module: nn.Module, config: PretrainedConfig, parts: Parts, among: Collection[int] | None = None
) -> float:
    """Weights that one token is multiplied with: all matrices, experts as far as they are chosen.

    `among` are the identities of those that count; None for all.
    """
    share = _expert_share(config)
    used = 0.0
    for name, parameter in module.named_parameters():
        if parameter.dim() >= 2 and (among is None or id(parameter) in among):
            used += parameter.numel() / parts(parameter) * (share if _is_routed(name) else 1.0)
    return used


def attention_operations(config: PretrainedConfig, layer_type: str, sequence_length: int) -> float:
    """Scores and their product with the values, per token, forward, causal."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if not isinstance(heads, int):
        return 0.0
    head_size = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    seen = sequence_length / 2
    window = getattr(config, "sliding_window", None)
    if "sliding" in layer_type and isinstance(window, int):
        seen = min(seen, window)
    return float(4.0 * seen * heads * head_size)


def parts_of_attention(layer: nn.Module, parts: Parts) -> int:
    """Into how many slices the heads of a layer are cut: those of what is cut of its attention."""
    return max((parts(each) for name, each in layer.named_parameters() if "att" in name.partition(".")[0]), default=1)


def activation_bytes_per_token(
    layer: nn.Module,
    config: PretrainedConfig,
    itemsize: int,
    share_of_norms: float,
    parts: Parts,
    *,
    trained: Collection[int] | None = None,
    between: int = 1,
) -> float:
    """Each product keeps its input and hands on an output that the next operation keeps; norms work in fp32.

    Compiled layers (`share_of_norms` 0) make norms again, and keep once what several products read. The last matrix of
    a module leads back to the hidden state and has slices of its input; the others have slices of their output. A
    product with a weight that is not among `trained`, by identity (None: all are), keeps its input only for an adapter
    beside it, which itself keeps what is between its two maps. Hidden states outside of attention and mlp are cut into
    `between` parts.
    """
    share = _expert_share(config) or 1.0
    width = int(config.hidden_size)
    elements, read = 0.0, dict[tuple[str, int, bool], float]()
    named = [(plain_name(name), each) for name, each in layer.named_parameters() if each.dim() > 1]
    adapters = [(name, each) for name, each in named if _LORA in name]
    adapted = {name.partition(_LORA)[0] for name, _ in adapters}
    for name, first in adapters:
        if name.endswith("A.weight"):
            elements += first.shape[0] * (share if _is_routed(name) else 1.0)
    matrices = [(name, each) for name, each in named if _LORA not in name]
    last = {_outer(name): name for name, _ in matrices}
    for name, parameter in matrices:
        slices = parts(parameter)
        if parameter.dim() == 2 and not _is_routed(name):
            outputs, inputs = parameter.shape
            leads_back = outputs == width and last[_outer(name)] == name
            elements += outputs / (between if leads_back else slices)
            is_frozen = trained is not None and id(parameter) not in trained
            if is_frozen and name.rpartition(".")[0] not in adapted:
                continue
            wanted = inputs / (slices if leads_back else 1)
            if share_of_norms:
                elements += wanted
            else:
                read[_outer(name), inputs, leads_back] = wanted
        elif parameter.dim() == 3 and _is_routed(name):
            elements += share * parameter.shape[0] * (parameter.shape[1] + parameter.shape[2]) / slices
    norms = share_of_norms * 2.0 * width * (4 + itemsize) / between
    return float(itemsize * (elements + sum(read.values()))) + norms


def unpacked(layer: nn.Module, few_bits: Collection[int]) -> int:
    """Weights of packed experts that are held in few bits: a forward pass keeps them in whole for the backward pass."""
    return sum(each.numel() for each in layer.parameters() if id(each) in few_bits and each.ndim == 3)


def _is_routed(name: str) -> bool:
    return "experts" in name.split(".") and "shared" not in name


def _outer(name: str) -> str:
    """The module whose linear map has this parameter."""
    return name.rsplit(".", 2)[0]


def _expert_share(config: PretrainedConfig) -> float:
    """Chosen experts per token / experts."""
    total = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, key, None))),
        None,
    )
    chosen = getattr(config, "num_experts_per_tok", None)
    if isinstance(total, int) and isinstance(chosen, int):
        return min(1.0, chosen / total)
    return 1.0
