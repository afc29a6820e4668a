"""From final hidden states to logits, apart from the rest of the model; for any part of a sequence.

The family's own `ForCausalLM` forward runs around a stand-in for its base model that merely hands on the hidden states
it is given. So whatever the family does after its base model (norms, scaling, soft caps, a bias) stays its own, and
needs no code here. That this gives the family's logits is shown by the walk over all families and never assumed: see
`jllm.models.families.has_head_apart`. What is not shown runs its whole forward, and has `LogitsGiven` for a head.

Where the family's logits are a product with the output embedding, and at most a factor and a soft cap after it
(`jllm.models.pipeline.plain_head` finds out), the head says so: an objective may then make them itself.

Costs: a shallow copy of one module a call; its weights and children are the model's own.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from jllm.parallel.tensor.layers import shard_of
from jllm.parallel.tensor.vocabulary import VocabularyShard

CHUNK_ELEMENTS = 2**26
"""The most fp32 logits that an objective has at a time, where it can take them in chunks: 256 MiB."""


def tokens_of_a_chunk(vocabulary: int, *, itemsize: int = 4, is_trained: bool = False) -> int:
    """How many tokens have that many logits, or in a type of another size as many bytes of them; at least one.

    Twice as many where the head `is_trained` with what is in the buffer of the chunk: each chunk reads and writes the
    gradient of the whole head, so that fewer of them are faster.
    """
    return max(1, CHUNK_ELEMENTS * (4 + 4 * is_trained) // itemsize // vocabulary)


@dataclass(frozen=True, kw_only=True)
class PlainHead:
    """Logits that are `factor * x`, or with a soft cap `cap * tanh(factor * x / cap)`, where x is what `linear` makes
    of `Head.before`.

    Attributes:
        name: of `linear` in the model.
        linear: the output embedding, [vocabulary, width], perhaps with a bias.
        factor: above 0.
        cap: above 0; None for none.
    """

    name: str
    linear: nn.Linear
    factor: float = 1.0
    cap: float | None = None


class Head:
    """Maps hidden states [..., n, width], any run of n tokens, to logits [..., n, vocabulary].

    Attributes:
        vocabulary: how many logits a token has in this process, or in one that has more.
        plain: what the logits are, where they are a product; None elsewhere.
        shard: which part of the vocabulary the logits are of; None where they are of all.
    """

    def __init__(self, vocabulary: int, plain: PlainHead | None = None, shard: VocabularyShard | None = None) -> None:
        # Ranks that share the vocabulary take the same tokens at a time.
        self.vocabulary, self.plain, self.shard = shard.largest if shard is not None else vocabulary, plain, shard

    def __call__(self, hidden: Tensor) -> Tensor:
        """The logits of these tokens."""
        raise NotImplementedError

    def before(self, hidden: Tensor) -> Tensor:
        """Of a plain head: what its product is made of, [..., n, width of the product]."""
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
        plain: as `jllm.models.pipeline.plain_head` found it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        base_name: str,
        inner_names: tuple[str, ...],
        returned: type[Any],
        plain: PlainHead | None = None,
    ) -> None:
        shard = shard_of(model.get_output_embeddings())
        super().__init__(model.config.get_text_config(decoder=True).vocab_size, plain, shard)
        self._model, self._base_name, self._inner_names, self._returned = model, base_name, inner_names, returned
        takes = inspect.signature(type(model).forward).parameters
        self._arguments = {"use_cache": False} if "use_cache" in takes else {}

    def __call__(self, hidden: Tensor) -> Tensor:
        """The family's own logits."""
        logits = self._run(self._around(hidden), hidden)
        return logits.view(*hidden.shape[:-1], logits.shape[-1])

    def before(self, hidden: Tensor) -> Tensor:
        """The family's own forward, up to its product."""
        assert self.plain is not None
        around = replaced(self._around(hidden), self.plain.name, _End(self.plain.linear))
        try:
            self._run(around, hidden)
        except _EndReachedError as end:
            return end.reached.view(*hidden.shape[:-1], end.reached.shape[-1])
        raise AssertionError("the family's forward did not come to its output embedding")

    def after(self, hidden: Tensor, name: str, product: Tensor) -> Tensor:
        """The logits, if the module of that name gave `product` for these hidden states."""
        around = self._around(hidden)
        return self._run(replaced(around, name, _Given(self._model.get_submodule(name), (), product)), hidden)

    def _around(self, hidden: Tensor) -> PreTrainedModel:
        """The model, whose base hands on `hidden`."""
        output = self._returned(last_hidden_state=_rows(hidden))
        base = self._model.get_submodule(self._base_name)
        return replaced(self._model, self._base_name, _Given(base, self._inner_names, output))

    def _run(self, around: PreTrainedModel, hidden: Tensor) -> Tensor:
        logits: Tensor = around(inputs_embeds=_rows(hidden), **self._arguments).logits
        return logits


def _rows(hidden: Tensor) -> Tensor:
    return hidden.reshape(-1, *hidden.shape[-2:])


Model = TypeVar("Model", bound=nn.Module)


def replaced(model: Model, name: str, module: nn.Module) -> Model:
    """A shallow copy of `model` with another module of that name; all others are its own."""
    first, _, rest = name.partition(".")
    changed = copy.copy(model)
    changed._modules = dict(model._modules)
    changed._modules[first] = replaced(model.get_submodule(first), rest, module) if rest else module
    return changed


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


class _EndReachedError(Exception):
    """Carries what came to the end of a forward pass that goes no further."""

    def __init__(self, reached: Tensor) -> None:
        super().__init__()
        self.reached = reached


class _End(_Given):
    """Stands in for a module, and ends the forward pass that comes to it."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__(replaced, (), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises what it was given."""
        [reached] = args
        raise _EndReachedError(reached)
