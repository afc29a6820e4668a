"""Which attention kernel runs, and what it needs to keep packed documents apart.

`auto` takes the first of these that fits:

    flash_attention_3, ...  CUDA, half precision, a flash-attn package is installed and for the device, shown to be
                            right: 3, 4 (heads of at most 128 elements) or 2
    varlen                  CUDA, half precision, shown to be right: causal attention, perhaps with a window; it is
                            a kernel of our own on Hopper, for heads of 64 and 128 elements, elsewhere
                            `torch.nn.attention.varlen`, and SDPA for rows of one document
    flex_attention          CUDA, half precision, families without SDPA: soft-capped scores, attention sinks
    sdpa                    elsewhere, CPU and fp32 included
    eager                   elsewhere, families without SDPA

flash and varlen know documents by their cumulative lengths. `packing` derives them from the position ids once per
micro-batch, on the device where it is told how many there are at most and how long they get (`DocumentBounds`), else
with one copy to the host; layers get them as arguments, so no layer waits for the device.
flex gets blocks of a mask and skips the empty ones; sdpa and eager get the whole mask, S x S. transformers builds both
from the position ids, once per stage. Asked for off CUDA, varlen goes document by document through SDPA: no S x S
mask, work only within documents. flex is refused there: PyTorch has no backward pass for it.

Without a mask, a family whose layers do not hand on lengths and windows trains on something else, silently. So flash
and varlen are for families that the catalogue shows to be right with them (`Family.by_lengths`, from a comparison with
the default kernel); what it does not know has the kernels with masks.
"""

import dataclasses
import functools
import inspect
import itertools
import re
import sys
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jllm.errors import UserError
from jllm.models.families import shown_by_lengths
from jllm.models.kernels import available as kernels

VARLEN = "varlen"
CHOICES = ("auto", VARLEN, *sorted(kernels.FLASH), "flex_attention", "sdpa", "eager")
_BOUNDS_MULTIPLE = 16
"""Compiled layers see few numbers of documents."""
# Signs in a family's own code of what SDPA has not: a soft cap and sinks.
_BEYOND_SDPA = ("softcap=self", "s_aux=self")


def choose_attention(
    family: type[PreTrainedModel],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    wanted: str = "auto",
    dropout: float = 0.0,
    head_size: int | None = None,
) -> str:
    """The implementation to load `family` with: `wanted`, or for `auto` the best one that it can do here.

    `dropout` is that of the attention, by the model's configuration; varlen and flex have none. `head_size` are the
    elements of a head, where they are known.

    Raises:
        UserError: `wanted` is none of `CHOICES`, or does not work for this family, device, dtype or dropout.
    """
    device = torch.device(device)
    is_fast = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if wanted != "auto":
        _check(family, wanted, device, is_fast)
        if dropout and wanted in (VARLEN, "flex_attention"):
            raise UserError(
                f"--attn_implementation {wanted}: the model's config.json has attention dropout of {dropout}, which it "
                "cannot do; give auto, or set attention_dropout to 0 there"
            )
        return wanted
    if is_fast:
        for name in kernels.FLASH:
            is_shown = shown_by_lengths(family) in _shown_for(name, head_size)
            if is_shown and _takes_flash(family, name) and kernels.is_installed(name):
                return name
        if dropout:
            return "sdpa" if takes_sdpa(family) else "eager"
        if takes_varlen(family) and kernels.HAS_VARLEN:
            return VARLEN
        if family._supports_flex_attn and not takes_sdpa(family):
            return "flex_attention"
    return "sdpa" if takes_sdpa(family) else "eager"


def takes_varlen(family: type[PreTrainedModel]) -> bool:
    """Whether varlen was shown to compute this family's attention."""
    return shown_by_lengths(family) == "varlen"


def _shown_for(name: str, head_size: int | None) -> tuple[str, ...]:
    """What the catalogue must say of a family for `auto` to take this flash-attn; nothing will do where it cannot."""
    if name != "flash_attention_4":
        return ("varlen", "flash")
    # It has no backward pass for soft caps, nor for large heads.
    return ("varlen",) if head_size is not None and head_size <= kernels.LARGEST_FOR_FLASH_4 else ()


def takes_sdpa(family: type[PreTrainedModel]) -> bool:
    """Whether SDPA computes the family's attention.

    Some versions of transformers say so of families whose soft cap or sinks it then leaves out.
    """
    source = inspect.getsource(sys.modules[family.__module__])
    return bool(family._supports_sdpa) and not any(sign in source for sign in _BEYOND_SDPA)


def _takes_flash(family: type[PreTrainedModel], name: str) -> bool:
    """Whether the family works with this flash-attn; some take only kernels that know attention sinks."""
    fitting = getattr(family, "_compatible_flash_implementations", None)
    return bool(family._supports_flash_attn) and (fitting is None or name in fitting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentBounds:
    """What is known of the documents of micro-batches before a device sees them.

    Attributes:
        most: documents that a micro-batch has at most, over all its rows; padding belongs to the last one of a row.
        longest: tokens that a document has at most.
    """

    most: int
    longest: int

    @classmethod
    def of(cls, positions: Iterable[Tensor]) -> Self:
        """Of micro-batches with these position ids [B, S], which start at 0 in each document."""
        found = [each.numpy() for each in positions]
        return cls(
            most=max(each.size - int(np.count_nonzero(each)) for each in found),
            longest=max(int(each.max()) for each in found) + 1,
        )

    def bounds(self, is_start: Tensor) -> Tensor:
        """The cumulative lengths [N + 1] of documents that start there ([B, S]), int32; those that are missing to the
        most, rounded up, are empty ones at the end. The host waits for nothing."""
        size = -(-self.most // _BOUNDS_MULTIPLE) * _BOUNDS_MULTIPLE + 1
        found = torch.nonzero_static(is_start.flatten(), size=size, fill_value=is_start.numel())
        return found[:, 0].to(torch.int32)


def packing(
    model: PreTrainedModel,
    positions: Tensor,
    *,
    are_rows_whole: bool = False,
    documents: DocumentBounds | None = None,
) -> dict[str, Any]:
    """Arguments for the model's forward that tell documents apart; empty where masks are built from positions.

    A document starts where positions do not go on by one, and at the start of each row. Where it is known beforehand
    that they go on throughout a row (`are_rows_whole`), nobody looks at them; where `documents` are known, the device
    alone does. Neither waits for the device.
    """
    implementation = str(model.config._attn_implementation)
    if are_rows_whole:
        return _of_whole_rows(positions) if implementation.startswith("flash_attention") else {}
    if implementation != VARLEN and not implementation.startswith("flash_attention"):
        return _masks(model, positions) if _forgets_positions(type(model.base_model)) else {}  # type: ignore[arg-type]
    if documents is not None and positions.device.type == "cuda":
        if implementation == VARLEN and documents.most == len(positions):
            return {}  # one document a row: plain causal attention
        return _by_bounds(documents.bounds(_starts(positions)), documents.longest)
    is_start = _starts(positions.to("cpu"))
    if implementation == VARLEN and int(is_start.sum()) == len(positions):
        return {}
    bounds = nn.functional.pad(is_start.flatten().nonzero()[:, 0], (0, 1), value=positions.numel()).to(torch.int32)
    longest = int(bounds.diff().max())
    if positions.device.type == "cuda":
        bounds = bounds.pin_memory().to(positions.device, non_blocking=True)
    return _by_bounds(bounds, longest)


def _starts(positions: Tensor) -> Tensor:
    """Where documents start, [B, S]."""
    found = torch.ones_like(positions, dtype=torch.bool)
    found[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return found


def _by_bounds(bounds: Tensor, longest: int) -> dict[str, Any]:
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def _of_whole_rows(positions: Tensor) -> dict[str, Any]:
    """The same where each row [B, S] is one document."""
    rows, length = positions.shape
    bounds = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=positions.device)
    return _by_bounds(bounds, length)


@functools.cache
def _forgets_positions(base: Any) -> bool:
    """Whether a family builds its masks without the position ids, but would take ready ones (GPT-OSS, AFMoE)."""
    source = inspect.getsource(inspect.unwrap(base.forward))
    built = re.search(r"mask_kwargs = \{(.*?)\}", source, re.DOTALL)
    return built is not None and "position_ids" not in built[1] and "attention_mask, dict)" in source


def _masks(model: PreTrainedModel, positions: Tensor) -> dict[str, Any]:
    """The masks that such a family would build, if it looked at the positions; nothing where these do not restart.

    Raises:
        UserError: layers of a kind whose mask is not known.
    """
    if bool((positions[:, 1:] == positions[:, :-1] + 1).all()):
        return {}
    config = model.config.get_text_config(decoder=True)
    like = torch.empty(*positions.shape, 0, dtype=model.dtype, device=positions.device)
    makers = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if unknown := kinds - set(makers):
        raise UserError(
            f"--block_mask: model type {config.model_type!r} has layers of kind {', '.join(sorted(unknown))}, whose "
            "documents cannot be kept apart; leave the option out"
        )
    masks = {
        kind: makers[kind](
            config=config, inputs_embeds=like, attention_mask=None, past_key_values=None, position_ids=positions
        )
        for kind in kinds
    }
    return {"attention_mask": masks}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, heads, S, size] in, [B, S, heads, size] out; causal.

    Keys and values may have fewer heads than queries, and values another size. `cu_seq_lens_q` [documents + 1], int32,
    bounds the documents in the rows laid end to end; without it each row is one document.
    """
    assert attention_mask is None, "varlen attention takes documents, not masks"
    assert unused.get("softcap") is None, "varlen attention cannot soft-cap scores; use flex_attention or eager"
    assert unused.get("s_aux") is None, "varlen attention has no sinks; use flex_attention or eager"
    batch, heads, length, _ = query.shape
    window = sliding_window if sliding_window is not None and sliding_window < length else None
    if cu_seq_lens_q is None and window is None:
        attended = kernels.causal(query, key, value, scaling, dropout)
        return attended.transpose(1, 2).contiguous(), None
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        max_length_q = length
    assert max_length_q is not None
    assert not dropout, "varlen attention has no dropout"
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    if query.device.type in kernels.BY_LENGTHS_ON:
        attended = kernels.by_lengths(query, key, value, cu_seq_lens_q, max_length_q, scaling, window)
    else:
        attended = _by_document(query, key, value, cu_seq_lens_q, scaling, window)
    return attended.view(batch, length, heads, value.shape[-1]), None


# Its lengths are numbers on the host, of which a compiler would make one graph each.
@torch.compiler.disable
def _by_document(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """The same by SDPA, one document after the other; waits for the device once."""
    edges = bounds.tolist()
    pieces = []
    for start, end in itertools.pairwise(edges):
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        if window is None or end - start <= window:
            pieces.append(kernels.causal(q, k, v, scaling)[0].transpose(0, 1))
            continue
        groups = q.shape[1] // k.shape[1]
        steps = torch.arange(end - start, device=query.device)
        distance = steps[:, None] - steps[None, :]
        mask = (distance >= 0) & (distance < window)
        attended = nn.functional.scaled_dot_product_attention(
            q, repeat_kv(k, groups), repeat_kv(v, groups), attn_mask=mask, scale=scaling
        )
        pieces.append(attended[0].transpose(0, 1))
    return torch.cat(pieces)


def _check(family: type[PreTrainedModel], wanted: str, device: torch.device, is_fast: bool) -> None:
    """Raise a `UserError` where `family` cannot run with `wanted` on this device."""
    given = f"--attn_implementation {wanted}"
    if wanted not in CHOICES:
        raise UserError(f"{given}: not an attention implementation; give one of {', '.join(CHOICES)}")
    if wanted == VARLEN and not takes_varlen(family):
        raise UserError(f"{given}: not shown to be right for {family.__name__} (see `jllm models`); give auto")
    if wanted.startswith("flash_attention"):
        if not is_fast or not kernels.is_installed(wanted):
            raise UserError(
                f"{given} needs CUDA, --precision bf16, the {kernels.package_of(wanted)} package, and a device that it"
                " is for; give auto"
            )
        if _takes_flash(family, wanted) and shown_by_lengths(family) == "none":
            raise UserError(f"{given}: not shown to be right for {family.__name__} (see `jllm models`); give auto")
    if wanted == "flex_attention" and device.type != "cuda":
        raise UserError(f"{given} needs CUDA: PyTorch has no backward pass for it on {device.type}; give auto or eager")
    supported = {
        "flex_attention": family._supports_flex_attn,
        "sdpa": takes_sdpa(family),
        **{name: _takes_flash(family, name) for name in kernels.FLASH},
    }
    if not supported.get(wanted, True):
        raise UserError(f"{given}: transformers does not offer it for {family.__name__}; give auto or eager")


# Registered without a mask function: transformers then builds no mask, and does not wait for the device to look at
# the position ids.
if VARLEN not in ALL_ATTENTION_FUNCTIONS:
    AttentionInterface.register(VARLEN, varlen_attention)
