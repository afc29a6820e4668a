"""Compiled decoder layers: one graph for all layers of a kind, in place of one operation after the other.

What makes a layer's output is compiled by torch.compile as a function of the layer, so that equal layers share the
result. So is the norm after the last one. What else is around the layers (embedding, masks, head) stays as it is.

Each kind has two functions: one for micro-batches of the run's usual shape, whose sizes are constants, and one for all
others, whose sizes are variables. The documents of packed rows are variables in both. Which of the two runs follows
from the shape alone and not from what ran before: a layer that runs again in the backward pass, and a run that goes on,
get the one that they had.

What cannot be traced (attention that is recomputed alone, routers that are watched) runs between compiled pieces.
Before a compiled layer's first pass in training, and the first with other arguments, it is tried on what it was given,
forward and backward. Where compiling or that fails, layers of that kind run as they are, and a line says why. Slices
try theirs alone: one in which it fails would leave the others waiting.

Guarantees: losses and gradients are those of the layers as they are, but for rounding and for the numbers that dropout
draws; the catalogue says for which families that was shown (`Family.compiled`).
Cost: seconds to minutes at the first step, on every process; less where the cache of code has it. Trials are one pass
more of the first micro-batch.
"""

import functools
import inspect
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo import callback as compilations
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedModel

from jllm.models.activation_checkpointing import find_attention
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.pipeline.trial import trial
from jllm.parallel.alone import alone

Forward = Callable[..., Any]

BACKEND = "inductor"
MOST_GRAPHS = 32
"""Of one function: training and evaluation, plain and packed rows, layers of one class that differ."""
DOCUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Arguments of a layer as long as there are documents, of which no two micro-batches have the same number."""
_WORTH_TELLING = 1.0


class Shape(NamedTuple):
    """Rows and tokens a row of a micro-batch."""

    rows: int
    length: int


class CompiledLayers:
    """The compiled layers of a stage.

    Args:
        usual: the shape that has a function of its own; None: no shape has.
        tell: is given lines about what was compiled, and for how long.
        warn: is given a line for each kind that cannot be compiled.
        backend: of torch.compile; others than the usual one are for tests.

    Attributes:
        kinds: what was compiled, by class.
    """

    def __init__(
        self, usual: Shape | None, tell: Callable[[str], object], warn: Callable[[str], object], backend: str
    ) -> None:
        self.usual, self._tell, self.warn, self.backend = usual, tell, warn, backend
        self.kinds: dict[tuple[Any, ...], _Kind] = {}
        self._started = _CLOCK.seconds
        self._is_told = False

    def kind_of(self, module: nn.Module, forward: Forward, further: tuple[Any, ...]) -> "_Kind":
        """The kind of modules of this class which `forward` runs, given the module and `further` first."""
        key = (type(module), forward, further)
        if key not in self.kinds:
            self.kinds[key] = _Kind(type(module).__name__, forward, further, self)
        return self.kinds[key]

    @property
    def failed(self) -> dict[str, str]:
        """Kinds that run as they are → why."""
        return {kind.name: kind.reason for kind in self.kinds.values() if kind.reason}

    def after_last_layer(self, shape: Shape) -> None:
        """Say what was compiled since the last time, where that took a while."""
        seconds = _CLOCK.seconds - self._started
        if seconds < _WORTH_TELLING:
            return
        self._started += seconds
        names = sorted({kind.name for kind in self.kinds.values() if not kind.reason})
        if not names:
            return
        what = f"{len(names)} kind{'s' * (len(names) > 1)} of layer"
        which = "evaluation" if not torch.is_grad_enabled() else f"{shape.rows} x {shape.length} tokens"
        self._tell(f"compiled {what} {f'for {which} too, ' * self._is_told}in {seconds:.0f} s")
        self._is_told = True


class _Kind:
    """Layers that run the same code, and its two compiled functions.

    Attributes:
        reason: why they run as they are, at one shape at least; empty where they are compiled.
    """

    def __init__(self, name: str, forward: Forward, further: tuple[Any, ...], owner: CompiledLayers) -> None:
        self.name, self._plain, self._further, self._owner = name, forward, further, owner
        # Sizes are variables in both, or the number of documents would be a constant; `_as_constants` makes those of
        # the usual shape constants. Dynamo keeps what it compiles with the code of a function: each has its own.
        self._functions = {
            is_usual: torch.compile(_own_code(forward), backend=owner.backend, dynamic=True)
            for is_usual in (True, False)
        }
        self._has_failed = {True: False, False: False}
        self._tried: set[tuple[int, bool, frozenset[str]]] = set()
        self.reason = ""

    def run(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the layer makes of these arguments."""
        is_usual = self._owner.usual is not None and shape_of(args, kwargs) == self._owner.usual
        if self._has_failed[is_usual]:
            return self._plain(layer, *self._further, *args, **kwargs)
        if is_usual:
            _as_constants(args, kwargs)
        function = self._functions[is_usual]
        if not self._works(function, layer, args, kwargs, is_usual=is_usual):
            return self._plain(layer, *self._further, *args, **kwargs)
        try:
            return function(layer, *self._further, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            self._give_up(error, is_usual=is_usual)
        return self._plain(layer, *self._further, *args, **kwargs)

    def _works(
        self, function: Forward, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_usual: bool
    ) -> bool:
        """Whether it runs forward and backward; tried where that is news.

        A backward pass that fails in a step cannot be made up for: by then the pipeline has gone on.
        """
        given = frozenset(name for name, value in kwargs.items() if any(True for _ in _tensors(value)))
        about = (id(layer), is_usual, given)
        if about in self._tried or not torch.is_grad_enabled():
            return True
        self._tried.add(about)
        inputs = [*_tensors((args, kwargs))]
        try:
            with trial(inputs[0].device), alone():
                output = function(layer, *self._further, *args, **kwargs)
                made = [each for each in _tensors(output) if each.requires_grad]
                # Nothing is added to the gradients of parameters, which have hooks.
                wanted = [each for each in inputs if each.requires_grad]
                wanted = wanted or [each for each in layer.parameters() if each.requires_grad]
                if made and wanted:
                    torch.autograd.grad(made, wanted, [torch.zeros_like(each) for each in made], allow_unused=True)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # of whatever the compiler wrote
            self._give_up(error, is_usual=is_usual)
            return False
        return True

    def _give_up(self, error: Exception, *, is_usual: bool) -> None:
        self._has_failed[is_usual] = True
        if not self.reason:
            self.reason = _said(error)
            self._owner.warn(f"note: {self.name} is not compiled, and runs as it is: {self.reason}")


def compile_layers(
    model: PreTrainedModel,
    span: StageSpan,
    *,
    usual: Shape | None = None,
    attention_apart: bool = False,
    memory_budget: float = 1.0,
    tell: Callable[[str], object] = print,
    warn: Callable[[str], object] = print,
    backend: str = BACKEND,
) -> CompiledLayers:
    """Compile this stage's decoder layers, each when it first runs.

    Call after adapters are attached and before activation checkpointing is.

    Args:
        model: loaded and sealed.
        span: of the stage.
        usual: the shape of most micro-batches.
        attention_apart: whether attention is going to be recomputed alone: then it is compiled alone, too.
        memory_budget: of what layers would keep for the backward pass, the share that they keep; of this process.
        tell: is given lines for people, as in `CompiledLayers`.
        warn: likewise.
        backend: likewise.
    """
    _prepare_compiler(memory_budget)
    _CLOCK.listen()
    state = CompiledLayers(usual, tell, warn, backend)
    structure = structure_of(model)
    if not structure.layers:
        warn(f"note: model type {model.config.model_type!r} has no list of decoder layers: nothing is compiled")
        return state
    layers = [model.get_submodule(f"{structure.layers}.{index}") for index in range(span.first_layer, span.end_layer)]
    if attention_apart:
        for layer in layers:
            for attention in find_attention(layer):
                _replace_forward(attention, state)
    modules = [*layers, *_norms_after(model, span)]
    for module in modules:
        _replace_forward(module, state, is_last=module is modules[-1])
    return state


def _norms_after(model: PreTrainedModel, span: StageSpan) -> Iterator[nn.Module]:
    """What the last stage's base model does after its layers, where that is no product."""
    structure = structure_of(model)
    base, *_ = structure.layers.split(".")
    for name in structure.after if span.is_last else ():
        module = model.get_submodule(name)
        if name.startswith(f"{base}.") and all(each.ndim == 1 for each in module.parameters()):
            yield module


def shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shape | None:
    """The shape of the micro-batch that a layer is given."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    return Shape(*hidden.shape[:2]) if isinstance(hidden, Tensor) and hidden.dim() > 2 else None


def _replace_forward(module: nn.Module, state: CompiledLayers, *, is_last: bool = False) -> None:
    found = _code_of(module)
    if found is None:
        state.warn(f"note: {type(module).__name__} is not compiled, and runs as it is: its forward was replaced")
        return
    kind = state.kind_of(module, *found)

    def compiled(*args: Any, **kwargs: Any) -> Any:
        output = kind.run(module, args, kwargs)
        if is_last and (shape := shape_of(args, kwargs)) is not None:
            state.after_last_layer(shape)
        return output

    module.forward = compiled


def _code_of(module: nn.Module) -> tuple[Forward, tuple[Any, ...]] | None:
    """The function that makes the module's output, and what it is given after the module.

    None where the module's own forward is something else than a function of the class, or of the module first.
    """
    own = module.__dict__.get("forward")
    if own is None:
        forward = type(module).forward
        return (forward, ()) if inspect.isfunction(forward) else None
    if isinstance(own, functools.partial) and own.args[:1] == (module,) and not own.keywords:
        return (own.func, own.args[1:]) if inspect.isfunction(own.func) else None
    return None


def _own_code(function: Forward) -> Forward:
    """The same function with a code object of its own."""
    assert isinstance(function, types.FunctionType)
    twin = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__dict__.update(function.__dict__)
    return twin


def _as_constants(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let the sizes of all tensors be constants, but for the number of documents."""
    for tensor in _tensors((args, {name: value for name, value in kwargs.items() if name not in DOCUMENTS})):
        torch._dynamo.mark_static(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _said(error: Exception) -> str:
    """The first line of an error, or of the one behind it, at most 200 characters of it."""
    cause = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(cause).splitlines()]
    return next(filter(None, lines), type(cause).__name__)[:200].rstrip(".:;")


def _prepare_compiler(memory_budget: float) -> None:
    """Settings of this process's compiler."""
    from torch._dynamo import config as tracing
    from torch._functorch import config as graphs

    # Of functions that only remember what they returned.
    warnings.filterwarnings("ignore", message="(?s)Dynamo detected a call to a `functools.lru_cache`", module="torch")
    tracing.recompile_limit = max(tracing.recompile_limit, MOST_GRAPHS)
    # Layers that would need more run as they are, and that is said.
    tracing.fail_on_recompile_limit_hit = not tracing.suppress_errors
    # A backward pass that cannot be compiled fails with its forward pass, which can still run as it is.
    graphs.force_non_lazy_backward_lowering = True
    graphs.activation_memory_budget = memory_budget
    from torch._inductor import config as inductor

    from jllm.models.kept_sums import KeptSums

    # Below 1, the budget alone says what is kept.
    inductor.joint_custom_post_pass = KeptSums() if memory_budget == 1 else None
    if torch.are_deterministic_algorithms_enabled():
        inductor.deterministic = True


class _Clock:
    """How long this process has compiled, in seconds, since it first listened."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = 0.0

    def listen(self) -> None:
        handler = compilations.callback_handler
        if self._start not in handler.start_callbacks:
            handler.register_start_callback(self._start)
            handler.register_end_callback(self._end)

    def _start(self, *about: Any) -> None:
        self._since = time.perf_counter()

    def _end(self, *about: Any) -> None:
        self.seconds += time.perf_counter() - self._since


_CLOCK = _Clock()
