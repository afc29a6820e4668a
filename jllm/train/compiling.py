"""Whether a run compiles its decoder layers, why it does not, and where compiled code is kept.

Code from a cache is run: it lies in a folder of this user's cache that nobody else may write to, unless the user named
another one (TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR).
"""

import os
import sys
from dataclasses import dataclass

import torch
from torch._inductor.runtime import cache_dir_utils
from transformers import PreTrainedModel

from jllm.errors import UserError, say
from jllm.guards import caches
from jllm.models.compiled import BACKEND, CompiledLayers, Shape, compile_layers
from jllm.models.families import shown_compiled
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.sequence_parallel.share import RunPlan
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.train.config import TrainConfig
from jllm.train.data.batching import padded_length
from jllm.train.distributed import launch
from jllm.train.distributed.agreement import Agreement
from jllm.train.shape import RunShape

_PRECISIONS = ("bf16", "fp32")
_THREADS = 8
"""Of a process, which compile at once: more are idle, for a stage has few kinds of layers."""
_FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "compiled", "TRITON_CACHE_DIR": "triton"}


@dataclass(frozen=True, kw_only=True)
class Compiling:
    """Whether decoder layers are compiled.

    Attributes:
        is_on: whether they are.
        said: for people: that, and why not.
    """

    is_on: bool
    said: str


def choose_compiling(
    config: TrainConfig,
    family: type[PreTrainedModel],
    *,
    device: str,
    attention: str,
    quantised: QuantisationPlan | None,
) -> Compiling:
    """What `--compile` means for a model of this family, on this device.

    Args:
        config: the options.
        family: the family's own class.
        device: of the run.
        attention: the kernel that the family gets.
        quantised: what of the model is held in 4 or 8 bits.

    Raises:
        UserError: layers are not compiled, and an option needs that they are.
    """
    shown = shown_compiled(family)
    where = ", where their slices are of one size" if config.model_parallel_size > 1 else ""
    if config.compile == "off":
        return Compiling(is_on=False, said="decoder layers are not compiled: --compile off")
    if config.compile == "on":
        doubt = "" if shown else f", which was not shown to be right for {family.__name__}"
        return Compiling(is_on=True, said=f"decoder layers are compiled{where}{doubt}")
    why = None
    if config.sequence_sharded_norms:
        return Compiling(is_on=False, said="decoder layers are not compiled: --sequence_sharded_norms")
    if torch.device(device).type != "cuda":
        why = f"the device is {torch.device(device).type}"
    elif config.precision not in _PRECISIONS:
        why = f"--precision {config.precision}"
    elif quantised is not None and quantised.quantisation.bits == 8:
        # It looks for outliers, and so waits for the device.
        why = "the model is held in 8 bits"
    elif quantised is not None and quantised.experts:
        why = "packed experts are quantised"
    elif attention == "flex_attention":
        # It is compiled by itself. The masks of packed rows are functions, made anew for every micro-batch.
        why = "attention is flex_attention"
    elif not shown:
        why = f"not shown to be right for {family.__name__}"
    if why is None:
        return Compiling(is_on=True, said=f"decoder layers are compiled{where}")
    if config.activation_memory_budget < 1:
        raise UserError(
            f"--activation_memory_budget {config.activation_memory_budget:g} is for compiled layers, and they are not:"
            f" {why}; give --compile on, or --checkpoint_grad_interval instead"
        )
    return Compiling(is_on=False, said=f"decoder layers are not compiled: {why} (--compile on does it)")


def compile_stage(
    model: PreTrainedModel,
    span: StageSpan,
    config: TrainConfig,
    shape: RunShape,
    agreement: Agreement,
    longest: int | None,
    runs: RunPlan | None = None,
) -> CompiledLayers | None:
    """Compile a loaded stage's decoder layers; the run's first process tells how long it took. Every process calls it.

    None where slices are of unlike sizes: a compiler may then order what passes between them differently in each.

    Args:
        model: with adapters attached.
        span: of the stage.
        config: the options.
        shape: of the run.
        agreement: between the processes.
        longest: tokens of the data's longest row, where that is known.
        runs: how processes share the tokens of rows; None where each has them whole.
    """
    place = agreement.place
    usual = usual_shape(config, shape, longest)
    if usual is not None and runs is not None:
        bounds = runs.bounds(usual.length)
        usual = usual._replace(length=bounds[place.sequence + 1] - bounds[place.sequence])

    def warn(line: str) -> None:
        # Other pipelines have the same stages.
        if place.data == 0:
            say(line, file=sys.stderr, flush=True)

    def tell(line: str) -> None:
        if place.is_first:
            say(line, flush=True)

    if shape.mesh.tensor > 1 and not _are_slices_alike(model, agreement):
        if place.tensor == 0:
            warn(f"note: decoder layers of stage {place.pipe} are not compiled: its slices are of unlike sizes")
        return None
    return compile_layers(
        model,
        span,
        usual=usual,
        attention_apart=config.checkpoint_grad_attention,
        memory_budget=config.activation_memory_budget,
        tell=tell,
        warn=warn,
        backend=BACKEND,
    )


def _are_slices_alike(model: PreTrainedModel, agreement: Agreement) -> bool:
    """Whether all processes of this stage hold the same sizes of its decoder layers."""
    name = structure_of(model).layers
    layers = model.get_submodule(name).parameters() if name else ()
    own = agreement.place.pipe, [tuple(each.shape) for each in layers]
    return all(found == own for found in agreement.gather(own) if found[0] == own[0])


def usual_shape(config: TrainConfig, shape: RunShape, longest: int | None) -> Shape | None:
    """That of a micro-batch with a row of full length; None where micro-batches have all kinds of shapes."""
    if config.batch_size_tokens is not None:
        return None
    known = [each for each in (config.seq_len, longest - 1 if longest is not None else None) if each is not None]
    if not known:
        return None
    return Shape(shape.micro_batch, padded_length(min(known), config.seq_len))


def keep_code_private() -> None:
    """Have compilers keep their code in the user's cache folder, and work on few cores.

    Call before anything is compiled: flex attention is compiled, too.
    """
    # PyTorch sets its own variable to this when a part of its compiler is imported, which anything may do.
    guessable = cache_dir_utils.default_cache_dir()
    for variable, name in _FOLDERS.items():
        if os.environ.get(variable, "") in ("", guessable):
            os.environ[variable] = str(caches.private_folder(name))
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        from torch._inductor import config as inductor

        ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or launch.world_size())
        share = len(os.sched_getaffinity(0)) // max(1, ranks)
        inductor.compile_threads = max(1, min(_THREADS, share))
