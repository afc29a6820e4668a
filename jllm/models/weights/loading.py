"""Weights of one pipeline stage, from a Hugging Face folder or at random; the whole model is never held.

`load_stage` reads only the tensors that the stage owns (the files are mapped, not read). `init_stage` draws random
weights module by module, each module from its own seed, so the weights do not depend on the number of stages.

Costs: loading holds the stage's own weights once, plus the tensors in flight. Weights on CPU are copied out of the
mapped files one tensor at a time, so that these may be replaced while the model lives.
"""

import copy
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from jllm.errors import UserError, say
from jllm.models.dropout import override_in_modules, set_dropout
from jllm.models.legacy.layouts import layout_of
from jllm.models.legacy.reading import read_raw_config, read_tensors
from jllm.models.pipeline.carving import seal, stage_class, structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.pipeline.stand_ins import AbsentEmbedding, AbsentLayer, AbsentModule, AbsentPart
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.dequantised import whole
from jllm.models.weights.finite import check_finite
from jllm.models.weights.initial import initialise
from jllm.models.weights.kept import KeptDtypes
from jllm.models.weights.mapped import owned
from jllm.models.weights.quantisation import QuantisationPlan
from jllm.models.weights.rewritten import places_of
from jllm.models.weights.source import (
    causal_class,
    check_plain_weights,
    quiet,
    read_config,
    read_header,
    stored_dtypes,
    weight_files,
    weight_of_quantised,
)
from jllm.models.weights.streamed_file import stored_tensors
from jllm.parallel.tensor.slices import Slice, slice_of

_STAND_INS = (AbsentEmbedding, AbsentLayer, AbsentModule, AbsentPart)


def load_stage(
    folder: str | Path,
    span: StageSpan,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    names_unused: bool = True,
    dropout: float | None = None,
    quantisation: QuantisationPlan | None = None,
    cut: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """This stage's part of the model in `folder`, in training mode, reading only this stage's tensors.

    With `names_unused` a first stage says on standard error which stored tensors have no place in the whole model.
    `dropout` overrides the configuration's (`jllm.models.dropout.set_dropout`). `quantisation` is what is held in 4 or
    8 bits; products are then computed in `dtype`. `cut` leaves the model some of what was loaded, while that may still
    be the mapped files: on CPU, where weights have the stored type, only what is left is read and takes memory. What is
    quantised is cut by itself, whatever type it is stored in; to know how, `cut` is tried on a stage without memory.

    Raises:
        UserError: the folder holds no model, one that cannot be split this way, not all of its weights, or some that
            are not finite.
    """
    is_stored = quantisation is not None and quantisation.quantisation.is_stored
    config = read_config(folder, trust_remote_code=trust_remote_code, quantised=is_stored)
    published = set_dropout(config, dropout)
    check_plain_weights(folder, quantised=is_stored)
    _check_span(config, span)
    family = causal_class(config, folder=folder, trust_remote_code=trust_remote_code)
    reader: Any = stage_class(family, span)
    model: PreTrainedModel
    device = torch.device(device)
    slices: dict[str, Slice] = {}
    if quantisation is not None and cut is not None:
        slices = stage_slices(config, family, span, cut)
    try:
        origin: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        if (layout := layout_of(raw := read_raw_config(Path(folder)))) is not None:
            with torch.device("meta"):
                wanted = set(reader._from_config(copy.deepcopy(config), dtype=dtype).state_dict())
            tensors = read_tensors(Path(folder), layout, raw, config, wanted, dtype)
            origin = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        with quiet():
            model, report = reader.from_pretrained(
                **origin,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                **_quantiser(quantisation, dtype, slices),
                **({} if device.type == "cpu" else {"device_map": {"": device}}),
            )
    except SafetensorError as error:
        raise UserError(f"the weights in {str(folder)!r} cannot be read ({error}); download them again") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{len(missing)} tensors of {family.__name__} are missing in {str(folder)!r} ({missing[0]}); "
            "give the folder of the whole model, as it was published"
        )
    quantiser = getattr(model, "hf_quantizer", None)
    misfits = quantiser.misfits if quantiser is not None else []
    if mismatched := sorted([*report["mismatched_keys"], *misfits]):
        name, stored, wanted = mismatched[0]
        raise UserError(
            f"{len(mismatched)} tensors in {str(folder)!r} do not fit its config.json: {name} is {list(stored)}, "
            f"the configuration says {list(wanted)}; give the config.json that was published with the weights"
        )
    if span.is_first or span.is_last:
        _check_ties(model, folder)
    if span.is_first and names_unused:
        _name_unused(model, report["unexpected_keys"], folder)
    seal(model, span)
    if quantiser is not None:
        quantiser.check(model, folder)
    if cut is not None:
        cut(model)
    if device.type == "cpu" and layout is None:
        _own_memory(model, stored_dtypes(folder), has_quantised=quantiser is not None)
    check_finite(model.named_parameters(), folder)
    override_in_modules(model, dropout, published)
    model.train()
    return model


def init_stage(
    config: PretrainedConfig,
    span: StageSpan,
    *,
    dtype: torch.dtype,
    seed: int,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    family: type[PreTrainedModel] | None = None,
    dropout: float | None = None,
) -> PreTrainedModel:
    """Random weights for this stage, by the family's own initialisation.

    Every module draws from a generator seeded by (seed, its name in the whole model): the same seed gives the same
    weights for any number of stages, on the same kind of device. What the family's `_init_weights` does not reach has
    the value that its constructor gives it. `family` is for classes that transformers does not carry
    (`--trust_remote_code`); `dropout` as in `load_stage`.

    Raises:
        UserError: the model cannot be split this way.
    """
    _check_span(config, span)
    config = copy.deepcopy(config)
    published = set_dropout(config, dropout)
    derived = stage_class(family or causal_class(config), span)
    keywords = {} if attn_implementation is None else {"attn_implementation": attn_implementation}

    def construct() -> PreTrainedModel:
        with torch.device("meta"):
            built: PreTrainedModel = derived._from_config(copy.deepcopy(config), dtype=dtype, **keywords)
        if not span.is_last:  # the last stage needs a tied embedding, to copy it
            seal(built, span)
        return built

    model = construct()
    initialise(model, construct, seed=seed, device=torch.device(device), skipped=_STAND_INS)
    for duplicate, original in structure_of(model).tied if span.is_last else ():
        owner, _, leaf = duplicate.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(original))
    seal(model, span)
    override_in_modules(model, dropout, published)
    model.train()
    return model


def stage_slices(
    config: PretrainedConfig, family: type[PreTrainedModel], span: StageSpan, cut: Callable[[PreTrainedModel], None]
) -> dict[str, Slice]:
    """What `cut` leaves of a stage's parameters, by their names; without what it leaves whole. Takes no memory."""
    with torch.device("meta"):
        bare = stage_class(family, span)._from_config(copy.deepcopy(config))
    seal(bare, span)
    cut(bare)
    return {name: held for name, parameter in bare.named_parameters() if (held := slice_of(parameter)) is not None}


def load_buffers(model: PreTrainedModel, folder: Path) -> None:
    """Give a stage the buffers that were published with its model, such as biases that choose experts.

    No checkpoint of a run has them, because nothing trains them. A folder without weights changes nothing.

    Raises:
        UserError: the weights cannot be read.
    """
    wanted = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    if not wanted:
        return
    try:
        weight_files(folder)
    except UserError:  # a configuration alone
        return
    stored = {tensor.name: tensor for tensors in stored_tensors(folder) for tensor in tensors}
    kept = KeptDtypes(model, None)
    for name, (place, _) in places_of(model, stored).items():
        if (buffer := wanted.get(place)) is not None:
            buffer.data = whole(stored[name]).to(buffer.device, kept.in_memory(place, buffer.dtype))


def _check_ties(model: PreTrainedModel, folder: str | Path) -> None:
    """transformers unties what is stored twice and differs, which the stages could not agree on.

    Raises:
        UserError: config.json ties two such tensors.
    """
    for copied, original in structure_of(model).tied:
        if copied not in model.all_tied_weights_keys:
            holders = [path for path in weight_files(folder) if copied in read_header(path)]
            raise UserError(
                f"{holders[0] if holders else folder} holds a {copied} that differs from {original}, but config.json "
                "says tie_word_embeddings true; say false there to have both, or remove the tensor from the file"
            )


def _name_unused(model: PreTrainedModel, unexpected: Collection[str], folder: str | Path) -> None:
    """One line on stderr where files hold tensors that the whole model has no place for.

    `unexpected` is what transformers found no place for in this stage, less what the family ignores by design.
    """
    stored, prefix = structure_of(model).stored, model.base_model_prefix + "."
    # A base model's file has names without the prefix, which are only found where their place is.
    of_weights = {name: weight_of_quantised(name) for name in unexpected}
    unused = {
        name
        for name, weight in of_weights.items()
        if not stored & {weight, prefix + weight, weight.removeprefix(prefix)}
    }
    if unused:
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        unused -= {rename_source_key(name, renamings, converters)[0] for name in stored}
    if unused:
        names = sorted(unused, key=dot_natural_key)
        say(
            f"warning: {len(names)} tensors in {str(folder)!r} have no place in the model that config.json describes"
            f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); they are neither trained nor exported",
            file=sys.stderr,
            flush=True,
        )


def _quantiser(plan: QuantisationPlan | None, dtype: torch.dtype, slices: dict[str, Slice]) -> dict[str, Any]:
    """What transformers needs to be told to quantise as planned."""
    if plan is None:
        return {}
    # Imported here: bitsandbytes is not there in every installation.
    from jllm.models.weights.quantised_loading import StageQuantizationConfig

    return {"quantization_config": StageQuantizationConfig(plan, dtype, slices)}


def _own_memory(model: PreTrainedModel, stored: Collection[torch.dtype], *, has_quantised: bool) -> None:
    """Copy weights out of the mapped files, one at a time.

    On CPU, tensors whose dtype is one of the `stored` ones may still be the file: overwriting it (an export into the
    same folder) would change them or kill the process. Others were copied when they were converted, and so were
    quantised ones.
    """
    # Slices have been copied.
    own = (
        each
        for each in model.parameters()
        if (each.is_floating_point() or not has_quantised) and slice_of(each) is None
    )
    for tensor in (*own, *model.buffers()):
        if tensor.dtype in stored or not tensor.is_floating_point() or not stored:
            tensor.data = owned(tensor.data)


def _check_span(config: PretrainedConfig, span: StageSpan) -> None:
    layers = count_layers(config)
    if not 0 <= span.first_layer < span.end_layer <= layers:
        raise UserError(
            f"stage {span.index} would own layers {span.first_layer} to {span.end_layer} of a model with {layers}; "
            "every stage needs at least one layer: use fewer stages or other boundaries"
        )
