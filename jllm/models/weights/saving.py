"""Weights of one pipeline stage to a Hugging Face folder; the whole model is never held.

`save_stage` and `write_index` write what plain `from_pretrained` reads: published names, the published layout (per
expert where the family's checkpoints are), and one copy of a tied embedding.

Costs: saving holds one file's worth (`shard` bytes) beside the model where the dtype changes, and nothing where it does
not.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_converters, revert_weight_conversion

from jllm import atomic
from jllm.errors import UserError
from jllm.guards import notation
from jllm.models.dropout import restore_dropout
from jllm.models.legacy.alibi import AlibiLlamaConfig, AlibiLlamaForCausalLM
from jllm.models.legacy.layouts import layout_of, published_config
from jllm.models.legacy.reading import read_raw_config, to_published
from jllm.models.pipeline.carving import structure_of
from jllm.models.pipeline.span import StageSpan
from jllm.models.weights.kept import KeptDtypes
from jllm.models.weights.source import (
    INDEX_NAME,
    SINGLE_NAME,
    read_header,
    weight_files,
)
from jllm.models.weights.tensor_file import tensor_file

TEMPLATE_NAME, TEMPLATES_NAME = "chat_template.jinja", "additional_chat_templates"
SHARD_BYTES = 4 * 2**30
STAGE_METADATA = {"format": "pt"}
"""What transformers wants to see in the header of a file of weights."""


def stage_file_name(stage: int, part: int) -> str:
    """What a file of weights is called until `write_index` knows how many there are; they stay in this order."""
    return f"model-stage-{stage:05d}-{part:05d}.safetensors"


def stage_files(
    model: PreTrainedModel,
    span: StageSpan,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """This stage's tensors under their published names, in host memory, one file at a time: its name and content.

    File names are unique per stage, and become the final ones in `write_index`. `state_dict` replaces the model's own
    tensors (names as in the model): a checkpoint that is exported without a model in memory. A tied head's copy on
    the last stage is left out: the published file has the embedding only. `dtype` is that of all which neither the
    published files in `source` nor the family keep in another (`jllm.models.weights.kept`).
    """
    tensors = dict(model.state_dict() if state_dict is None else state_dict)
    for left_out in (*(duplicate for duplicate, _ in structure_of(model).tied), *(model._keys_to_ignore_on_save or ())):
        tensors.pop(left_out, None)
    kept = KeptDtypes(model, dtype, source)
    kept.look_at(tensors)
    published = published_tensors(model, tensors)
    for part, names in enumerate(parts_of(published, shard_bytes)):
        file_name = stage_file_name(span.index, part)
        yield file_name, {name: _as_stored(published[name], kept.of(name, published[name])) for name in names}


def published_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model, by its own names, as its family publishes them: names, and what is packed or split."""
    if isinstance(model, AlibiLlamaForCausalLM):
        return to_published(tensors)
    published: dict[str, torch.Tensor] = revert_weight_conversion(model, tensors)
    return published


def conversion_groups(model: PreTrainedModel) -> dict[str, list[str]]:
    """The model's tensors in groups, by some name of each: what `published_tensors` needs together, and no more."""
    reverse = [entry.reverse_transform() for entry in get_model_conversion_mapping(model, add_legacy=False)[::-1]]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    groups: dict[str, list[str]] = {}
    for name in model.state_dict():
        if isinstance(model, AlibiLlamaForCausalLM):
            group = re.sub(r"\.[qkv]_proj\.", ".W_pack.", name)
        else:
            group, _ = apply_converters(name, converters)
        groups.setdefault(group, []).append(name)
    return groups


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """The folder that a run leaves: the whole model, for plain `from_pretrained`.

    Attributes:
        source: what of it is no weight is copied.
        dtype: of the weights, but for those that are published or kept in another.
    """

    source: Path
    dtype: torch.dtype
    marker: str = "config.json"
    replaces: str = "model*.safetensors*"

    def stage_files(self, model: PreTrainedModel, span: StageSpan) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """This stage's tensors, one file at a time."""
        return stage_files(model, span, dtype=self.dtype, source=self.source)

    def size(self, model: PreTrainedModel) -> int:
        """Bytes of this stage's tensors, about, without those that another process has too, and writes."""
        own = (weight for weight in model.parameters() if not getattr(weight, "ds_pipe_replicated", False))
        return sum(weight.numel() for weight in own) * self.dtype.itemsize

    def write_companions(self, model: PreTrainedModel, folder: Path, *, chat_template: str | None) -> None:
        """What is no tensor."""
        write_companions(model, folder, dtype=self.dtype, source=self.source, chat_template=chat_template)

    def has_weights(self, folder: Path) -> bool:
        """Whether all files of weights are there."""
        try:
            return bool(weight_files(folder))
        except UserError:
            return False

    def complete(self, folder: Path) -> None:
        """Name the files of all stages, and write the index over them."""
        write_index(folder)


class ExportedFolder(Protocol):
    """What a run leaves, written by its stages together.

    Attributes:
        marker: the file without which the folder is not complete.
        replaces: a pattern of file names that a new one puts itself in the place of.
    """

    @property
    def marker(self) -> str: ...
    @property
    def replaces(self) -> str: ...

    def stage_files(self, model: PreTrainedModel, span: StageSpan) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """What a stage adds: file name and content, in host memory."""

    def size(self, model: PreTrainedModel) -> int:
        """Bytes that a stage adds, about."""

    def write_companions(self, model: PreTrainedModel, folder: Path, *, chat_template: str | None) -> None:
        """What is no tensor; the first process writes it."""

    def has_weights(self, folder: Path) -> bool:
        """Whether a folder with its marker has all that belongs to it."""

    def complete(self, folder: Path) -> None:
        """The last thing, when every stage's files are there."""


def save_stage(
    model: PreTrainedModel,
    span: StageSpan,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    source: Path | None = None,
    state_dict: dict[str, torch.Tensor] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write the files of `stage_files`; returns published name → file name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    files = stage_files(model, span, dtype=dtype, source=source, state_dict=state_dict, shard_bytes=shard_bytes)
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
    model: PreTrainedModel,
    folder: str | Path,
    *,
    dtype: torch.dtype,
    source: str | Path | None = None,
    chat_template: str | None = None,
) -> None:
    """Everything of a Hugging Face folder that is not a weight: configuration, tokenizer, chat template, licence, ...

    Small files of `source` and its named chat templates are copied as they are, except config.json, which is written
    from the model with `dtype`. `chat_template` is what the data was made with; it is written where `source` has none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    is_alibi = isinstance(model.config, AlibiLlamaConfig)
    is_converted = source is not None and layout_of(read_raw_config(Path(source))) is not None and not is_alibi
    if source is not None:
        # An older checkpoint that became a native one needs none of the code it came with.
        copy_companions(source, folder, without=("modeling_", "configuration_") if is_converted else ())
    if chat_template is not None and not (source is not None and has_template(Path(source))):
        (folder / TEMPLATE_NAME).write_text(chat_template, encoding="utf-8")
    if isinstance(model.config, AlibiLlamaConfig):
        fields = published_config(model.config, read_raw_config(Path(source)) if source is not None else {}, dtype)
        (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        return
    config = type(model.config).from_dict(model.config.to_dict())
    restore_dropout(config, model)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if model.generation_config is not None and not (folder / "generation_config.json").exists():
        model.generation_config.save_pretrained(folder)


def copy_companions(source: str | Path, folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """Copy the small files of a model folder, and its named chat templates, but config.json and weights.

    Args:
        source: the model folder.
        folder: that is there.
        without: files whose names begin so.
    """
    for path in sorted(Path(source).iterdir()):
        is_left_out = path.name == "config.json" or path.name.startswith(without) or _is_weight_file(path.name)
        if path.is_file() and not is_left_out:
            shutil.copyfile(path, folder / path.name)
    if (named := Path(source) / TEMPLATES_NAME).is_dir():
        shutil.copytree(named, folder / TEMPLATES_NAME, dirs_exist_ok=True)


def has_template(source: Path) -> bool:
    """Whether a model folder has a chat template, in any of the places where transformers looks for one."""
    if any((source / name).exists() for name in (TEMPLATE_NAME, TEMPLATES_NAME, "chat_template.json")):
        return True
    try:
        settings = notation.read_json(source / "tokenizer_config.json")
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))


def parts_of(tensors: dict[str, torch.Tensor], shard_bytes: int) -> Iterator[list[str]]:
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


def _as_stored(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(dtype).cpu().contiguous()


def _is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".index.json", ".tmp"))
