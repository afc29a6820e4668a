"""The files of a peft folder, and what its configuration says; peft itself is not needed for that."""

import math
import re
from collections.abc import Callable, Collection, Mapping
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
        UserError: there is none, one of another kind, or one with a setting that cannot be meant.
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
        raise UserError(f"{option}{folder}: an adapter of type {kind!r}; {' or '.join(kinds)} is what this takes")
    for name, value in fields.items():
        if (wanted := _mistake(name, value)) is not None:
            raise UserError(f"{option}{folder}: {CONFIG_NAME} has {name} {value!r}, allowed is {wanted}; correct it")
    return fields


def _mistake(name: str, value: Any) -> str | None:
    """What a setting has to be, where it is not: JSON takes NaN, and peft takes what is no number for one."""
    if name == "r":
        return None if _is_rank(value) else "a whole number from 1 on"
    if name == "lora_alpha":
        return None if _is_factor(value) else "a finite number other than 0"
    if name == "rank_pattern":
        return None if _is_pattern(value, _is_rank) else "patterns of names, each with a whole number from 1 on"
    if name == "alpha_pattern":
        return None if _is_pattern(value, _is_factor) else "patterns of names, each with a finite number other than 0"
    if name in ("target_modules", "modules_to_save", "target_parameters"):
        is_list = isinstance(value, list) and all(isinstance(each, str) for each in value)
        is_expression = name == "target_modules" and isinstance(value, str) and _is_expression(value)
        return (
            None
            if value is None or is_list or is_expression
            else ("a list of names" + (", or a regular expression" if name == "target_modules" else ""))
        )
    return None


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_factor(value: Any) -> bool:
    return type(value) in (int, float) and value != 0 and math.isfinite(value)


def _is_pattern(value: Any, is_right: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    return isinstance(value, Mapping) and all(_is_expression(key) and is_right(each) for key, each in value.items())


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


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
