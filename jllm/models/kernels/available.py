"""Attention kernels of this machine: which packages of them are installed, and those of PyTorch as they are called.

`prefer_cudnn` is for the whole process: plain rows then go through cuDNN's attention where PyTorch has it, on Hopper
and later, and through PyTorch's flash-attention, memory-efficient and plain one, in that order, where it declines.
"""

import importlib.metadata
import importlib.util
import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from transformers.integrations.sdpa_attention import repeat_kv

FLASH = {
    # Best first: the module that a package brings, its name, and the generations of devices that it is for.
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3", range(8, 10)),
    "flash_attention_4": ("flash_attn", "flash-attn-4", range(9, 12)),
    "flash_attention_2": ("flash_attn", "flash-attn", range(8, 100)),
}
"""flash-attn, by transformers' names. Two of its packages bring the same module."""
LARGEST_FOR_FLASH_4 = 128
"""Elements of a head."""
_HALF = (torch.bfloat16, torch.float16)
_LARGEST_FUSED = 256

packed_attention: ModuleType | None = None
"""Attention within documents by a kernel of our own, where there is a Triton to compile it with."""
if importlib.util.find_spec("triton") is not None:
    from jllm.models.kernels import packed_attention

HAS_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
"""Whether this PyTorch has attention by document lengths."""
BY_LENGTHS_ON = ("cuda",)
"""Devices that it works on."""
_VARLEN_TAKES: frozenset[str] = frozenset()
if HAS_VARLEN:
    from torch.nn.attention.varlen import varlen_attn

    # Versions differ; looked up once, for a compiler does not follow such a question.
    _VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)


def package_of(name: str) -> str:
    """The package that brings one of `FLASH`."""
    return FLASH[name][1]


def is_installed(name: str) -> bool:
    """Whether the package of one of `FLASH` is there, for a device as this process has it."""
    module, package, generations = FLASH[name]
    if importlib.util.find_spec(module) is None:
        return False
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] in generations


def prefer_cudnn() -> None:
    """Have SDPA try cuDNN first, on devices where that is faster; not where runs are to repeat each other's bits."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return
    if torch.are_deterministic_algorithms_enabled() or not hasattr(torch._C, "_set_sdp_priority_order"):
        return
    first = int(SDPBackend.CUDNN_ATTENTION)  # type: ignore[call-overload]
    order = [int(each) for each in torch._C._get_sdp_priority_order()]
    torch._C._set_sdp_priority_order([first, *(each for each in order if each != first)])


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float = 0.0) -> Tensor:
    """SDPA with its causal fast path, [B, heads, S, size] in and out; keys and values may have fewer heads."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and not _groups_are_fused(query, value):
        key, value, groups = repeat_kv(key, groups), repeat_kv(value, groups), 1
    return nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=groups > 1
    )


def _groups_are_fused(query: Tensor, value: Tensor) -> bool:
    """Whether a fused kernel takes fewer key heads: CUDA's kernels for fp32 and for other sizes do not."""
    size = query.shape[-1]
    return query.device.type != "cuda" or (query.dtype in _HALF and size == value.shape[-1] <= _LARGEST_FUSED)


def by_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
    keys: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Attention by document lengths on CUDA: [T, heads, size] in, [T, heads, size of values] out, T the tokens of all
    rows; documents by their `bounds`, and the length of the `longest`. Both are also those of keys, unless documents
    have more `keys`: the last query of a document then sees its last key.

    Ours runs what it is for (`jllm.models.kernels.packed_attention`), and `torch.nn.attention.varlen` the rest."""
    if keys is None and packed_attention is not None and packed_attention.fits(query, key, value):
        own: Tensor = packed_attention.attend(query, key, value, bounds, scaling, window)
        return own
    options: dict[str, Any] = {"scale": scaling}
    if query.shape[1] > key.shape[1] and "enable_gqa" in _VARLEN_TAKES:
        # Versions that have no such option take fewer key heads unasked.
        options["enable_gqa"] = True
    size = query.shape[-1]
    narrow = value.shape[-1]
    if narrow != size:  # latent attention: values are narrower than keys
        value = nn.functional.pad(value, (0, size - narrow))
    if "window_size" in _VARLEN_TAKES:
        # How many keys to the left and to the right a query sees beside its own.
        options["window_size"] = (window - 1 if window is not None else -1, 0)
    else:
        assert window is None, "this version of PyTorch has no windows in attention by lengths"
        options["is_causal"] = True
    key_bounds, longest_keys = (bounds, longest) if keys is None else keys
    attended = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), bounds, key_bounds, longest, longest_keys, **options
    )
    assert isinstance(attended, Tensor)
    return attended[..., :narrow]
