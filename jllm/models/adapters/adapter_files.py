"""The files of a peft folder, and what its configuration says; peft itself is not needed for that."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from jllm.errors import UserError, of_file_system
from jllm.guards import notation

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def read_fields(folder: Path, *, kinds: Collection[str] = ("LORA",), option: str = "--lora ") -> dict[str, Any]:
    """The configuration of an adapter, as it stands in its file.

    Args:
        folder: of it.
        kinds: what it may be, by `peft_type`.
        option: before the folder in messages.

    Raises:
        UserError: there is none, or one of another kind.
    """
    path = folder / CONFIG_NAME
    try:
        fields: Any = notation.read_json(path)
    except OSError as error:
        raise of_file_system(error) or UserError(f"{option}{folder}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}{folder}: {CONFIG_NAME} is no JSON: {error}; give a folder that peft wrote") from None
    if not isinstance(fields, dict) or fields.get("peft_type") not in kinds:
        kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        known = f"{' or '.join(kinds)} is what this takes" if kinds != ("LORA",) else "only LORA is trained on"
        raise UserError(f"{option}{folder}: an adapter of type {kind!r}; {known}")
    return fields


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, by the names in its file.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"--lora {folder}: there is no {WEIGHTS_NAME}; give a folder that peft wrote as safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"--lora {folder}: {WEIGHTS_NAME} cannot be read ({error}); copy it again") from None
