"""What AutoTokenizer made of a folder, kept for the next command, which need not load it again.

An entry is bound to the content of every file that a tokenizer may read, to the versions of what reads them, and to the
questions asked. A folder that runs code of its own is not kept, nor is a name on the hub.

Where entries lie, and when they are believed, is for `jllm.guards.caches` to say.
Cost: one hash over the folder's files without weights, instead of seconds; some MB an entry.
"""

import contextlib
import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from jllm import __version__
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.broken_files import TEMPLATES_FOLDER
from jllm.guards import caches

LARGEST_FILE = 64 << 20
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".h5", ".msgpack")


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that a tokenizer may be made of, and others beside them; in order."""
    folders = [folder, folder / TEMPLATES_FOLDER]
    return sorted(path for each in folders if each.is_dir() for path in each.iterdir() if path.is_file())


def entry_of(folder: Path, questions: object) -> Path | None:
    """Where the facts about the tokenizer of this folder are kept; None where they cannot be.

    Args:
        folder: of the tokenizer.
        questions: what is asked of the tokenizer, beside what the version of jllm says.
    """
    sums = hashlib.sha256(repr((questions, __version__, platform.python_version())).encode())
    for library in ("transformers", "tokenizers", "sentencepiece", "tiktoken"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            sums.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for path in files_of(folder):
        if path.suffix in _WEIGHTS:
            continue
        if path.suffix == ".py" or path.stat().st_size > LARGEST_FILE:
            return None
        sums.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode() + path.read_bytes())
    kept = caches.place("tokenizers")
    return kept / f"{sums.hexdigest()}{caches.SUFFIX}" if kept is not None else None


def read(entry: Path) -> dict[str, Any] | None:
    """The facts, or None where there are none that can be read and believed."""
    content = caches.read(entry)
    try:
        value = fast_json.loads(content) if content is not None else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write(entry: Path, facts: bytes) -> None:
    """Keep facts, as JSON; a folder that cannot be written to is no error."""
    caches.write(entry, facts)
