"""`jllm cat2hf`: a checkpoint of any layout becomes one Hugging Face folder, in one process, without DeepSpeed.

Of a run that trains a model it is the model's folder, of one that trains adapters a peft folder. What is no weight is
taken from the model that the run went on from.

Guarantees: byte for byte what one process of the trainer exports of the checkpoint; what is read is compared with its
checksums first. The folder is there completely or not at all.
Cost: one tensor at a time, and of tensors that are published in another layout those that are converted together.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from jllm import atomic
from jllm.errors import UserError
from jllm.machine import require_disk, require_package
from jllm.models.adapters.adapter_files import WEIGHTS_NAME
from jllm.models.adapters.adapter_folder import PREFIX, AdapterFolder
from jllm.models.adapters.control import attach_control
from jllm.models.adapters.control_folder import control_folder
from jllm.models.weights.dequantised import whole
from jllm.models.weights.kept import KeptDtypes
from jllm.models.weights.rewritten import places_of
from jllm.models.weights.saving import (
    SHARD_BYTES,
    STAGE_METADATA,
    ModelFolder,
    conversion_groups,
    parts_of,
    published_tensors,
    stage_file_name,
    write_index,
)
from jllm.models.weights.source import bare_model, causal_class, model_info, read_config
from jllm.models.weights.streamed_file import StreamedTensor, made_whole, stored_tensors, write_files, write_streamed
from jllm.train.adapters import DTYPES, chosen_adapters, place_of_control
from jllm.train.checkpoint.folders import find_checkpoint
from jllm.train.checkpoint.format import WEIGHT
from jllm.train.checkpoint.reader import CheckpointReader
from jllm.train.checkpoint.regions import Region
from jllm.train.checkpoint.weights_alone import architecture_of, check_architecture, misfit, weight_alone
from jllm.train.options.adapters import precision_of_adapters

OPTION = "--checkpoint"


@dataclass(frozen=True, kw_only=True)
class Written:
    """What came of it.

    Attributes:
        checkpoint: that was taken.
        step: of it.
        what: was written: "the model" or "the adapter".
        has_checksums: whether what was read could be compared with what was written.
    """

    checkpoint: Path
    step: int
    what: str
    has_checksums: bool


def to_folder(
    checkpoint: Path,
    target: Path,
    *,
    model: Path | None = None,
    tag: str | None = None,
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Write `target`, a new folder.

    Args:
        checkpoint: one, or a folder of them, of which the newest complete one is taken, or that of `tag`.
        target: the new folder.
        model: the folder that the run went on from; by default the one that the checkpoint names.
        tag: a step, or the name of a checkpoint.
        trust_remote_code: whether code in the model's folder may be run.
        shard_bytes: of one file of weights.

    Raises:
        UserError: there is no checkpoint, it is damaged, or of another model.
    """
    reader = CheckpointReader(find_checkpoint(checkpoint, tag, option=OPTION))
    options = reader.state.config
    source = _source(model, options, reader.folder)
    has_control = options.get("control_adapter_rank") is not None
    has_adapters = has_control or options.get("lora_dim") is not None or options.get("lora") is not None
    config = read_config(source, trust_remote_code=trust_remote_code, quantised=has_adapters)
    check_architecture(reader.state, architecture_of(config), OPTION, way_out="")
    family = causal_class(config, folder=source, trust_remote_code=trust_remote_code)
    if has_control:
        _write_control(reader, source, target, config, family)
    elif has_adapters:
        _write_lora(reader, source, target, config, family)
    else:
        dtype = model_info(source, trust_remote_code=trust_remote_code, with_weights=False).dtype
        contents = _WholeModel(reader, source, bare_model(config, family, dtype=DTYPES[options["precision"]]), dtype)
        contents.write(target, shard_bytes)
    return Written(
        checkpoint=reader.folder,
        step=reader.state.step,
        what="the adapter" if has_adapters else "the model",
        has_checksums=reader.has_checksums,
    )


def _source(given: Path | None, options: dict[str, Any], checkpoint: Path) -> Path:
    if given is not None:
        return given
    named = Path(str(options.get("model")))
    if not (named / "config.json").is_file():
        raise UserError(f"{checkpoint} is of the model {named}, which is not there; give its folder with --model")
    return named


def _check_complete(reader: CheckpointReader, shapes: dict[str, tuple[int, ...]], *, has_adapters: bool) -> None:
    """Raises:
    UserError: the checkpoint lacks a weight, or has one that the model has no place for.
    """
    mistake = misfit(reader, shapes, has_adapters=has_adapters)
    left_over = reader.names(WEIGHT) - shapes.keys()
    if mistake is None and left_over:
        mistake = f"{min(left_over)} has no place in --model"
    if mistake is not None:
        raise UserError(f"{reader.folder}: {mistake}: give the model of this checkpoint")


class _WholeModel:
    """The folder of a model out of a checkpoint.

    Args:
        reader: of the checkpoint.
        source: the model that the run went on from.
        model: without memory, in the precision of the run.
        dtype: of the folder.
    """

    def __init__(self, reader: CheckpointReader, source: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._reader, self._source, self._model, self._dtype = reader, source, model, dtype
        left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        self._known = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
        self._weights = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        self._kept = KeptDtypes(model, dtype, source)
        self._kept.look_at(self._known)
        _check_complete(reader, self._weights, has_adapters=False)
        self._groups: dict[str, tuple[str, ...]] = {}
        """Published name → the model's own ones that it is made of."""
        for names in conversion_groups(model).values():
            group = tuple(name for name in names if name in self._known)
            for published in published_tensors(model, {name: self._known[name] for name in group}):
                self._groups[published] = group
        self._pieces = functools.lru_cache(maxsize=2)(self._published)

    def write(self, target: Path, shard_bytes: int) -> None:
        """Write the folder."""
        published = published_tensors(self._model, dict(self._known))
        files = [[self._streamed(name, published[name]) for name in part] for part in parts_of(published, shard_bytes)]
        require_disk(target, sum(tensor.nbytes for tensors in files for tensor in tensors), "the model")
        kind = ModelFolder(source=self._source, dtype=self._dtype)
        with atomic.new_folder(target) as folder:
            named = [(stage_file_name(0, part), tensors) for part, tensors in enumerate(files)]
            write_files(folder, named, STAGE_METADATA)
            write_index(folder)
            kind.write_companions(self._model, folder, chat_template=self._reader.state.chat_template)

    def _streamed(self, name: str, like: Tensor) -> StreamedTensor:
        dtype = self._kept.of(name, like)
        return made_whole(name, dtype, tuple(like.shape), lambda: self._pieces(self._groups[name])[name].to(dtype))

    def _published(self, group: tuple[str, ...]) -> dict[str, Tensor]:
        return published_tensors(self._model, {name: self._value(name) for name in group})

    def _value(self, name: str) -> Tensor:
        """A weight in the precision of the run; of what is none, which no checkpoint holds, the origin's."""
        like = self._known[name]
        dtype = self._kept.in_memory(name, like.dtype)
        if name not in self._weights:
            return self._of_origin(name).to(dtype)
        region = Region.of(tuple(like.shape))
        return weight_alone(self._reader, name, region, dtype).view(like.shape).to(dtype)

    def _of_origin(self, name: str) -> Tensor:
        stored = {tensor.name: tensor for tensors in stored_tensors(self._source) for tensor in tensors}
        for own, (place, _) in places_of(self._model, stored).items():
            if place == name:
                return whole(stored[own])
        raise UserError(f"{self._source} has no {name}, which the checkpoint does not hold; give the run's --model")


def _write_lora(
    reader: CheckpointReader, source: Path, target: Path, config: PretrainedConfig, family: type[PreTrainedModel]
) -> None:
    """Write the peft folder of a checkpoint of LoRA adapters."""
    require_package("peft", f"{reader.folder}, which is of adapters,", "adapters")
    from jllm.models.adapters.lora import attach_lora
    from jllm.models.adapters.lora_plan import plan_lora, targets_of
    from jllm.models.adapters.peft_folder import adapter_config, lora_folder, stored_parameters

    options = reader.state.config
    if options.get("lora") is not None:
        plan = targets_of(adapter_config(options["adapter_config"], Path(options["lora"])), config, family)
    else:
        plan = plan_lora(config, family, chosen_adapters({**options, "model": source}))
    model = bare_model(config, family, dtype=DTYPES[options["precision"]])
    attach_lora(model, plan, seed=0, dtype=DTYPES[precision_of_adapters(options["lora_dtype"], options["precision"])])
    _write_adapter(reader, target, stored_parameters(model), lora_folder(plan.config), model)


def _write_control(
    reader: CheckpointReader, source: Path, target: Path, config: PretrainedConfig, family: type[PreTrainedModel]
) -> None:
    """Write the folder of a checkpoint of control adapters."""
    options = reader.state.config
    place = place_of_control(options, config, family)
    model = bare_model(config, family, dtype=DTYPES[options["precision"]])
    dtype = DTYPES[precision_of_adapters(options["lora_dtype"], options["precision"])]
    attach_control(
        model, rank=place.rank, prefix=place.prefix, layers=place.layers, width=place.width, seed=0, dtype=dtype
    )
    kind = control_folder(rank=place.rank, layers=place.layers, base=str(source))
    parameters = dict(model.named_parameters())
    stored = [(name, own, parameters[own]) for name in kind.tensors(model) if (own := name.removeprefix(PREFIX))]
    _write_adapter(reader, target, stored, kind, model)


def _write_adapter(
    reader: CheckpointReader,
    target: Path,
    parameters: Sequence[tuple[str, str, Tensor]],
    kind: AdapterFolder,
    model: PreTrainedModel,
) -> None:
    """Write a folder of adapters.

    Args:
        reader: of the checkpoint.
        target: the folder.
        parameters: their names in the folder and in checkpoints, in the order of the file, and tensors like them.
        kind: of the folder.
        model: without memory, with the adapters.
    """
    _check_complete(reader, {own: tuple(value.shape) for _, own, value in parameters}, has_adapters=True)

    def streamed(published: str, own: str, like: Tensor) -> StreamedTensor:
        shape, dtype = tuple(like.shape), like.dtype
        return made_whole(published, dtype, shape, lambda: weight_alone(reader, own, Region.of(shape), dtype).to(dtype))

    with atomic.new_folder(target) as folder:
        write_streamed(folder / WEIGHTS_NAME, [streamed(*each) for each in parameters], STAGE_METADATA)
        kind.write_companions(model, folder, chat_template=None)
