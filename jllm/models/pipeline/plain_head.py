"""Whether a family's head is a plain product: found out by trying, never by the family's name.

The family's own forward runs behind its base model with given numbers in place of what its output embedding would
give. What comes out is compared with the forms of `PlainHead`: a factor, or a factor and a soft cap, both read off the
numbers. They go over 50 powers of 2 and both signs, in fp64, at every place of the vocabulary; each must come out as
the form says, to rounding. So tokens that are left out, a scale that is learned, other shapes of caps are seen.

Everything else is no plain head: an output embedding with a hook, an adapter, parametrised or in few bits; a forward
that does not call it, or fails here. Then the head is what it always is, the family's own forward.

Costs: the head's forward on two tokens with 8 bytes a logit on the CPU, and some passes over them. Works on models
without memory (meta device).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.models.pipeline.head import FamilyHead, PlainHead
from jllm.parallel.tensor.layers import VocabularyParallelLinear

_LEAST, _MOST = 2.0**-30, 2.0**30
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_plain_head(model: PreTrainedModel, *, base_name: str, inner_names: tuple[str, ...]) -> PlainHead | None:
    """What the logits of `model` are, where they are a product; None elsewhere.

    Args:
        model: with everything attached to it; its head must be here.
        base_name, inner_names: as `FamilyHead` has them.
    """
    linear = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is linear), None)
    if name is None or not _is_bare(linear):
        return None
    assert isinstance(linear, nn.Linear)
    # Families may make the hidden states wider or narrower, behind the base model or in it.
    for width in dict.fromkeys((model.config.get_text_config(decoder=True).hidden_size, linear.in_features)):
        head = FamilyHead(
            model,
            base_name=base_name,
            inner_names=inner_names,
            returned=_HiddenAlone,
            plain=PlainHead(name=name, linear=linear),
        )
        form = _tried(head, linear, width)
        if form is not None:
            return PlainHead(name=name, linear=linear, factor=form[0], cap=form[1])
    return None


def _tried(head: FamilyHead, linear: nn.Linear, width: int) -> tuple[float, float | None] | None:
    """(factor, cap) of a head that is given hidden states of this width."""
    assert head.plain is not None
    numbers = _numbers(linear.out_features)
    hidden = torch.ones(*numbers.shape[:-1], width, dtype=linear.weight.dtype, device=linear.weight.device)
    try:
        with torch.no_grad():
            reached, found = head.before(hidden), head.after(hidden, head.plain.name, numbers)
    except Exception:  # whatever it is: such a head is not one that is known here
        return None
    if reached.shape != (*hidden.shape[:-1], linear.in_features) or reached.dtype != linear.weight.dtype:
        return None
    return _form(numbers, found)


def _is_bare(module: nn.Module | None) -> bool:
    """Whether calling `module` multiplies with its weight, or its part of it, and does nothing else."""
    return (
        module is not None
        and type(module) in (nn.Linear, VocabularyParallelLinear)
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)  # as accelerate wraps it
        and not any(getattr(module, hooks) for hooks in _HOOKS)
    )


def _numbers(vocabulary: int) -> Tensor:
    """[1, n, vocabulary], fp64: for each place of the vocabulary two numbers at least, `_LEAST` and `_MOST` first."""
    halves = torch.arange(-40, 61, dtype=torch.float64) / 2
    # As fp32 has them: some families convert logits to it.
    positive = (2.0**halves).float().double()
    values = torch.cat([torch.tensor([_LEAST, _MOST], dtype=torch.float64), positive, -positive])
    tokens = 2 + len(values) // vocabulary
    return values[torch.arange(tokens * vocabulary) % len(values)].view(1, tokens, vocabulary)


def _form(given: Tensor, found: Tensor) -> tuple[float, float | None] | None:
    """(factor, cap) that make `found` of `given`, as `PlainHead` says; None where there are none."""
    if found.shape != given.shape or found.dtype not in (torch.float32, torch.float64) or found.is_meta:
        return None
    rounding = 32 * torch.finfo(found.dtype).eps
    given, found = given.flatten(), found.flatten().double()
    factor, most = (found[0] / given[0]).item(), found[1].item()
    # Out of a cap, a factor of 1 comes as 1 to rounding.
    factor = 1.0 if math.isclose(factor, 1.0, rel_tol=rounding) else factor
    if not factor > 0 or not most > 0:
        return None
    expected = given * factor
    cap = most if most < 0.5 * expected[1].item() else None
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    return (factor, cap) if torch.allclose(found, expected, rtol=rounding, atol=0) else None


class _HiddenAlone:
    """What a base model returns, of whatever class: final hidden states, and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: Any) -> Any:
        """As of a tuple."""
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        """None: what else a base model may return."""
        if name.startswith("__"):
            raise AttributeError(name)
        return None
