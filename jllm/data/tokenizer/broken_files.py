"""Which file of a tokenizer's folder is broken, where AutoTokenizer only says that something is.

Cost: the folder's files are read once more, after loading failed.
"""

from collections.abc import Iterable
from pathlib import Path

from jllm.guards import notation

TEMPLATES_FOLDER = "additional_chat_templates"
"""Where a tokenizer's folder keeps its named chat templates, beside the default one."""
_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
)


def broken_file(folder: Path) -> str | None:
    """What is wrong with the first broken file of a folder, which it names; None where none is known to be."""
    for path in [folder / name for name in _JSON] + [*_templates(folder), folder / "merges.txt"]:
        if path.is_symlink() and not path.exists():
            return f"{path}: a link to a file that is not there"
        if not path.exists():
            continue
        try:
            text = path.read_text(encoding="utf-8")
            value = notation.loads(text) if path.suffix == ".json" else None
        except UnicodeDecodeError as error:
            return f"{path}: no UTF-8 at byte {error.start}"
        except ValueError as error:
            return f"{path}: " + (f"not valid JSON: {error}" if text.strip() else "is empty")
        except (OSError, RecursionError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or 'nested too deeply'}"
        if path.suffix == ".json" and not isinstance(value, dict):
            return f"{path}: holds no JSON object but a {type(value).__name__}"
        if path.name == "tokenizer.json" and (reason := _refused(text)):
            return f"{path}: {reason}"
    return None


def _templates(folder: Path) -> Iterable[Path]:
    return [folder / "chat_template.jinja", *sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]


def _refused(text: str) -> str | None:
    """Why `tokenizers` does not read this `tokenizer.json`; None where it does."""
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library knows no narrower one
        return f"{error}"
    return None
