"""The files of a peft folder, and what its configuration says; peft itself is not needed for that."""

from pathlib import Path
from typing import Any

from jllm.errors import UserError, of_file_system
from jllm.guards import notation

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"


def read_fields(folder: Path) -> dict[str, Any]:
    """The configuration of the adapter of `--lora`, as it stands in its file.

    Raises:
        UserError: there is none, or one of another kind.
    """
    path = folder / CONFIG_NAME
    try:
        fields: Any = notation.read_json(path)
    except OSError as error:
        raise of_file_system(error) or UserError(f"--lora {folder}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"--lora {folder}: {CONFIG_NAME} is no JSON: {error}; give a folder that peft wrote") from None
    if not isinstance(fields, dict) or fields.get("peft_type") != "LORA":
        kind = fields.get("peft_type") if isinstance(fields, dict) else type(fields).__name__
        raise UserError(f"--lora {folder}: an adapter of type {kind!r}; only LORA is trained on")
    return fields
