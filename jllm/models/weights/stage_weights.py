"""Weights of one pipeline stage: from and to Hugging Face folders, without ever holding the whole model.

`load_stage` reads only the tensors that the stage owns (the files are mapped, not read). `init_stage` draws random
weights module by module, each module from its own seed, so the weights do not depend on the number of stages.
`save_stage` and `write_index` write what plain `from_pretrained` reads: published names, the published layout (per
expert where the family's checkpoints are), and one copy of a tied embedding.

Costs: loading holds the stage's own weights once, plus the tensors in flight; saving holds one file's worth (`shard`
bytes) beside the model where the dtype changes, and nothing where it does not. Weights on CPU are copied out of the
mapped files one tensor at a time, so that these may be replaced while the model lives.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
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
    revert_weight_conversion,
)
from transformers.utils import logging as transformers_logging

from jllm import atomic
from jllm.errors import UserError
from jllm.models.legacy.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM
from jllm.models.legacy.layouts import layout_of, published_config
from jllm.models.legacy.reading import read_raw_config, read_tensors, to_published
from jllm.models.pipeline.stage import (
    AbsentEmbedding,
    AbsentLayer,
    AbsentModule,
    StageSpan,
    anatomy_of,
    seal,
    stage_class,
)
from jllm.models.pipeline.structure import count_layers
from jllm.models.weights.initial import initialise
from jllm.models.weights.source import (
    INDEX_NAME,
    SINGLE_NAME,
    causal_class,
    read_config,
    read_header,
    stored_dtypes,
    weight_files,
)
from jllm.models.weights.tensor_file import tensor_file

SHARD_BYTES = 4 * 2**30
_STAND_INS = (AbsentEmbedding, AbsentLayer, AbsentModule)
STAGE_METADATA = {"format": "pt"}
"""What transformers wants to see in the header of a file of weights."""
_STAGE_FILE = "model-stage-{stage:05d}-{part:05d}.safetensors"


def load_stage(
    folder: str | Path,
    span: StageSpan,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    names_unused: bool = True,
) -> PreTrainedModel:
    """This stage's part of the model in `folder`, in training mode, reading only this stage's tensors.

    With `names_unused` a first stage says on standard error which stored tensors have no place in the whole model.

    Raises:
        UserError: the folder holds no model, one that cannot be split this way, or not all of its weights.
    """
    config = read_config(folder, trust_remote_code=trust_remote_code)
    weight_files(folder)
    _check_span(config, span)
    family = causal_class(config, folder=folder, trust_remote_code=trust_remote_code)
    reader: Any = stage_class(family, span)
    model: PreTrainedModel
    device = torch.device(device)
    try:
        origin: dict[str, Any] = {"pretrained_model_name_or_path": folder}
        if (layout := layout_of(raw := read_raw_config(Path(folder)))) is not None:
            with torch.device("meta"):
                wanted = set(reader._from_config(copy.deepcopy(config), dtype=dtype).state_dict())
            tensors = read_tensors(Path(folder), layout, raw, config, wanted, dtype)
            origin = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        with _quiet():
            model, report = reader.from_pretrained(
                **origin,
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                **({} if device.type == "cpu" else {"device_map": {"": device}}),
            )
    except SafetensorError as error:
        raise UserError(f"the weights in {str(folder)!r} cannot be read ({error}); download them again") from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(
            f"{len(missing)} tensors of {family.__name__} are missing in {str(folder)!r} ({missing[0]}); "
            "give the folder of the whole model, as it was published"
        )
    if mismatched := sorted(report["mismatched_keys"]):
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
    if device.type == "cpu" and layout is None:
        _own_memory(model, stored_dtypes(folder))
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
) -> PreTrainedModel:
    """Random weights for this stage, by the family's own initialisation.

    Every module draws from a generator seeded by (seed, its name in the whole model): the same seed gives the same
    weights for any number of stages, on the same kind of device. What the family's `_init_weights` does not reach has
    the value that its constructor gives it. `family` is for classes that transformers does not carry
    (`--trust_remote_code`).

    Raises:
        UserError: the model cannot be split this way.
    """
    _check_span(config, span)
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
    for duplicate, original in anatomy_of(model).tied if span.is_last else ():
        owner, _, leaf = duplicate.rpartition(".")
        setattr(model.get_submodule(owner), leaf, model.get_parameter(original))
    seal(model, span)
    model.train()
    return model


def stage_files(
    model: PreTrainedModel,
    span: StageSpan,
    *,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """This stage's tensors under their published names, in host memory, one file at a time: its name and content.

    File names are unique per stage, and become the final ones in `write_index`. `state_dict` replaces the model's own
    tensors (names as in the model): a checkpoint that is exported without a model in memory. A tied head's copy on
    the last stage is left out: the published file has the embedding only.
    """
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    for duplicate, _ in anatomy_of(model).tied:
        tensors.pop(duplicate, None)
    for ignored in model._keys_to_ignore_on_save or ():
        tensors.pop(ignored, None)
    is_alibi = isinstance(model, AlibiLlamaForCausalLM)
    published = to_published(tensors) if is_alibi else revert_weight_conversion(model, tensors)
    for part, names in enumerate(_parts(published, shard_bytes)):
        file_name = _STAGE_FILE.format(stage=span.index, part=part)
        yield file_name, {name: _as_stored(published[name], dtype) for name in names}


def save_stage(
    model: PreTrainedModel,
    span: StageSpan,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write the files of `stage_files`; returns published name → file name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    files = stage_files(model, span, dtype=dtype, state_dict=state_dict, shard_bytes=shard_bytes)
    for file_name, tensors in files:
        tensor_file(tensors, STAGE_METADATA, copy=False).write(folder / file_name)
        weight_map.update(dict.fromkeys(tensors, file_name))
    return weight_map


def write_index(folder: str | Path) -> dict[str, str]:
    """Give the files of all stages in `folder` their final names and write the index over them.

    One process calls it, after every stage's `save_stage` returned. One file becomes `model.safetensors` (no index),
    several become `model-00001-of-0000N.safetensors`. Returns tensor name → file name.
    """
    folder = Path(folder)
    files = sorted(folder.glob("model-stage-*.safetensors"))
    if not files:
        raise UserError(f"{str(folder)!r} has no stage files to index; save the stages there first")
    weight_map: dict[str, str] = {}
    total_size = total_parameters = 0
    for number, path in enumerate(files, start=1):
        name = SINGLE_NAME if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for key, entry in read_header(path).items():
            assert key not in weight_map, f"{key} written by two stages"
            weight_map[key] = name
            start, end = entry["data_offsets"]
            total_size += end - start
            total_parameters += torch.Size(entry["shape"]).numel()
        os.replace(path, folder / name)
    if len(files) > 1:
        index = {
            "metadata": {"total_parameters": total_parameters, "total_size": total_size},
            "weight_map": dict(sorted(weight_map.items())),
        }
        atomic.write_text(folder / INDEX_NAME, json.dumps(index, indent=2, sort_keys=True) + "\n")
    return weight_map


def write_companions(
    model: PreTrainedModel, folder: str | Path, *, dtype: torch.dtype, source: str | Path | None = None
) -> None:
    """Everything of a Hugging Face folder that is not a weight: configuration, tokenizer, chat template, licence, ...

    Small files of `source` are copied as they are, except config.json, which is written from the model with `dtype`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_alibi = isinstance(model.config, AlibiLlamaConfig)
    is_converted = source is not None and layout_of(read_raw_config(Path(source))) is not None and not is_alibi
    if source is not None:
        for path in sorted(Path(source).iterdir()):
            # An older checkpoint that became a native one needs none of the code it came with.
            is_code = is_converted and path.name.startswith(("modeling_", "configuration_"))
            if path.is_file() and path.name != "config.json" and not is_code and not _is_weight_file(path.name):
                shutil.copyfile(path, folder / path.name)
    if isinstance(model.config, AlibiLlamaConfig):
        fields = published_config(model.config, read_raw_config(Path(source)) if source is not None else {}, dtype)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)


def _check_ties(model: PreTrainedModel, folder: str | Path) -> None:
    """transformers unties what is stored twice and differs, which the stages could not agree on.

    Raises:
        UserError: config.json ties two such tensors.
    """
    for copied, original in anatomy_of(model).tied:
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
    stored, prefix = anatomy_of(model).stored, model.base_model_prefix + "."
    # A base model's file has names without the prefix, which are only found where their place is.
    unused = {name for name in unexpected if not stored & {name, prefix + name, name.removeprefix(prefix)}}
    if unused:
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        unused -= {rename_source_key(name, renamings, converters)[0] for name in stored}
    if unused:
        names = sorted(unused, key=dot_natural_key)
        print(
            f"warning: {len(names)} tensors in {str(folder)!r} have no place in the model that config.json describes"
            f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}); they are neither trained nor exported",
            file=sys.stderr,
            flush=True,
        )


def _own_memory(model: PreTrainedModel, stored: Collection[torch.dtype]) -> None:
    """Copy weights out of the mapped files, one at a time.

    On CPU, tensors whose dtype is one of the `stored` ones may still be the file: overwriting it (an export into the
    same folder) would change them or kill the process. Others were copied when they were converted.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in stored or not tensor.is_floating_point() or not stored:
            tensor.data = tensor.data.clone()


def _check_span(config: PretrainedConfig, span: StageSpan) -> None:
    layers = count_layers(config)
    if not 0 <= span.first_layer < span.end_layer <= layers:
        raise UserError(
            f"stage {span.index} would own layers {span.first_layer} to {span.end_layer} of a model with {layers}; "
            "every stage needs at least one layer: use fewer stages or other boundaries"
        )


def _parts(tensors: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, in groups of at most `shard_bytes` (a larger tensor is a group of its own)."""
    group: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if group and size + bytes_ > shard_bytes:
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_
    if group:
        yield group


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.cpu().contiguous()


def _is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".tmp"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: this module checks the report itself."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
