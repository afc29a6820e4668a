"""What of a model folder would run code that came with it or is fetched: refused, unless the user allowed it.

Beside `auto_map`, a configuration can name an implementation of attention or experts that transformers fetches from the
hub as compiled code (`kernels-community/...`). Names of implementations that transformers has itself hold no slash.

Cost: none to speak of; transformers is imported only to ask what it knows.
"""

import importlib.util
from pathlib import Path
from typing import Any

from jllm.errors import UserError
from jllm.guards import notation

_FETCHED_WITHOUT = {
    "flash_attention_2": "flash_attn",
    "flash_attention_3": "flash_attn_interface",
    "flash_attention_4": "flash_attn.cute",
}
"""Names for which transformers fetches a kernel where the package is not installed."""


def check_no_fetched_code(raw: Any, path: Path) -> None:
    """Refuse a configuration, or one of a part, that names an implementation which would be fetched.

    Raises:
        UserError: as said; `path` is the file, for the message.
    """
    pending = [raw]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        pending += value.values()
        for key, named in value.items():
            if "_implementation" not in key:
                continue
            for name in named.values() if isinstance(named, dict) else (named,):
                if isinstance(name, str) and _is_fetched(name):
                    raise UserError(
                        f"{path}: {key} is {name!r}, which is code from the hub; nothing is fetched: take {key} out of"
                        " the file"
                    )


def _is_fetched(name: str) -> bool:
    if "/" in name:
        return True
    package = _FETCHED_WITHOUT.get(name.rpartition("|")[2])
    missing = package is not None and importlib.util.find_spec(package.partition(".")[0]) is None
    return missing and importlib.util.find_spec("kernels") is not None


def check_no_remote_code(folder: Path) -> None:
    """Refuse a folder that plain transformers loads only with code of its own; for programs that run none.

    Raises:
        UserError: as said.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            raw = notation.read_json(path)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({error}); download it again") from None
        if not isinstance(raw, dict):
            raise UserError(f"{path} holds no object; download it again")
        check_no_fetched_code(raw, path)
        kind = raw.get("model_type") if name == "config.json" else raw.get("tokenizer_class")
        known = kind in CONFIG_MAPPING if name == "config.json" else hasattr(transformers, str(kind))
        if raw.get("auto_map") and not known:
            raise UserError(
                f"{path}: {kind!r} is known only to code in the folder, which is never run here; give a folder that"
                " transformers loads without it"
            )
