"""A model folder written anew, file by file, with some of its tensors changed; the whole model is never held.

Guarantees: tensors that are passed on keep every byte and their type; the files are cut as they were, and the small
ones beside them are copied. The new folder is there completely or not at all, and is read back as a model folder.
Cost: a pass over the files, in blocks; what the changed tensors need beside.
"""

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from jllm import atomic
from jllm.errors import UserError
from jllm.machine import require_disk
from jllm.models.legacy.layouts import layout_of
from jllm.models.weights.saving import STAGE_METADATA, copy_companions, stage_file_name, write_index
from jllm.models.weights.source import read_config
from jllm.models.weights.streamed_file import StreamedTensor, write_files

CONFIG_NAME = "config.json"


@contextlib.contextmanager
def written_folder(
    source: Path,
    target: Path,
    files: Sequence[Sequence[StreamedTensor]],
    raw: Mapping[str, Any] | None,
    *,
    what: str,
) -> Iterator[Path]:
    """Write `target`, which is there when the block ends well; in the block it has all but its name, and may get more.

    Args:
        source: the folder whose small files are copied.
        target: a new folder.
        files: the tensors of each file.
        raw: the new config.json; None for the source's as it is.
        what: is written, for messages.

    Raises:
        UserError: the disk is too full, or another command writes the folder.
    """
    require_disk(target, sum(tensor.nbytes for tensors in files for tensor in tensors), what)
    with atomic.new_folder(target) as folder:
        named = [(stage_file_name(number, 0), tensors) for number, tensors in enumerate(files)]
        write_files(folder, named, STAGE_METADATA)
        write_index(folder)
        copy_companions(source, folder)
        if raw is None:
            (folder / CONFIG_NAME).write_bytes((source / CONFIG_NAME).read_bytes())
        else:
            (folder / CONFIG_NAME).write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        yield folder


def raw_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder as it stands.

    Raises:
        UserError: there is none, or one of an older published layout.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        missing = "has no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"model folder {str(folder)!r} {missing}; give a Hugging Face model folder")
    raw = atomic.read_object(path, "download it again")
    assert raw is not None
    if (layout := layout_of(raw)) is not None:
        raise UserError(f"{path} is of a {layout.name} checkpoint; make a native folder of it with jllm convert first")
    return raw


def config_of(raw: Mapping[str, Any]) -> PretrainedConfig:
    """What a config.json says, of weights that are not quantised; raises as `read_config`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(raw), encoding="utf-8")
        return read_config(folder, trust_remote_code=None)


def set_everywhere(raw: Mapping[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A configuration with another value of a setting, also in the parts that say it."""
    changed = {
        key: set_everywhere(part, name, value) if isinstance(part, dict) and name in part else part
        for key, part in raw.items()
    }
    return {**changed, name: value}


def places_of(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Names in files → the model's own name, and whether values are converted on the way (packed, split, ...)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    found = {}
    for name in names:
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        found[name] = (place, pattern is not None)
    return found
