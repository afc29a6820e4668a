"""From final hidden states to logits, apart from the rest of the model; for any part of a sequence.

The family's own `ForCausalLM` forward runs around a stand-in for its base model that merely hands on the hidden states
it is given. So whatever the family does after its base model (norms, scaling, soft caps, a bias) stays its own, and
needs no code here. That this gives the family's logits is shown by the walk over all families and never assumed: see
`jllm.models.families.has_head_apart`. What is not shown runs its whole forward, and has `LogitsGiven` for a head.

Costs: a shallow copy of one module a call; its weights and children are the model's own.
"""

import copy
import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

CHUNK_ELEMENTS = 2**26
"""The most logits that an objective has at a time, where it can take them in chunks."""


def tokens_of_a_chunk(vocabulary: int) -> int:
    """How many tokens have that many logits; at least one."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


class Head:
    """Maps hidden states [..., n, width], any run of n tokens, to logits [..., n, vocabulary].

    Attributes:
        vocabulary: how many logits a token has.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits of these tokens."""
        raise NotImplementedError


class LogitsGiven(Head):
    """The head of a model that computes its logits whole: what it is given are the logits."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Its input."""
        return hidden


class FamilyHead(Head):
    """What a family does after its base model.

    Args:
        model: the causal model, of which everything after the base is here.
        base_name: the attribute of `model` that holds the base model.
        inner_names: where the list of layers lies below the base (`("decoder",)` for OPT): some families call that.
        returned: the class of what the base model returns.
    """

    def __init__(
        self, model: PreTrainedModel, *, base_name: str, inner_names: tuple[str, ...], returned: type[Any]
    ) -> None:
        super().__init__(model.config.get_text_config(decoder=True).vocab_size)
        self._model, self._base_name, self._inner_names, self._returned = model, base_name, inner_names, returned
        takes = inspect.signature(type(model).forward).parameters
        self._arguments = {"use_cache": False} if "use_cache" in takes else {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """The family's own logits."""
        rows = hidden.reshape(-1, *hidden.shape[-2:])
        output = self._returned(last_hidden_state=rows)
        around = copy.copy(self._model)
        around._modules = dict(self._model._modules)
        around._modules[self._base_name] = _Given(self._model.get_submodule(self._base_name), self._inner_names, output)
        logits: Tensor = around(inputs_embeds=rows, **self._arguments).logits
        return logits.view(*hidden.shape[:-1], logits.shape[-1])


class _Given(nn.Module):
    """Stands in for a base model: returns what it was given, and answers for everything else like the real one."""

    def __init__(self, replaced: nn.Module, inner_names: tuple[str, ...], output: Any) -> None:
        super().__init__()
        self.__dict__["_replaced"], self._output = replaced, output
        for name in inner_names[:1]:
            setattr(self, name, _Given(replaced.get_submodule(name), inner_names[1:], output))

    def __getattr__(self, name: str) -> Any:
        """Of the modules that stand in, else of the replaced one."""
        if name in self.__dict__.get("_modules", {}):
            return self.__dict__["_modules"][name]
        return getattr(self.__dict__["_replaced"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was given."""
        return self._output
