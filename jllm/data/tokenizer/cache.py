"""What AutoTokenizer made of a folder, kept for the next command, which need not load it again.

An entry is bound to the content of every file that a tokenizer may read, to the versions of what reads them, and to the
questions asked. A folder that runs code of its own is not kept, nor is a name on the hub.

Cost: one hash over the folder's files without weights, instead of seconds. At most
`MOST_ENTRIES` entries of some MB in `~/.cache/jllm/tokenizers`, or below `XDG_CACHE_HOME`.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from jllm import __version__, atomic
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.broken_files import TEMPLATES_FOLDER

MOST_ENTRIES = 16
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
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "jllm" / "tokenizers" / f"{sums.hexdigest()}.json"


def read(entry: Path) -> dict[str, Any] | None:
    """The facts, or None where there are none that can be read."""
    try:
        value: dict[str, Any] = fast_json.loads(entry.read_bytes())
        os.utime(entry)  # the oldest are removed first
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write(entry: Path, facts: bytes) -> None:
    """Keep facts, as JSON; a folder that cannot be written to is no error."""
    temporary = entry.with_name(f".{entry.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        atomic.create(temporary)
        temporary.write_bytes(facts)
        temporary.replace(entry)
        found = sorted(entry.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in found[:-MOST_ENTRIES]:
            old.unlink(missing_ok=True)
