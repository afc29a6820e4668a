"""The text of the raw2ids benchmarks: the Python source of this environment's site-packages, as JSON lines."""

import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MEGABYTE = 1_000_000


def texts() -> Iterator[str]:
    """Every Python file once, in the order of their paths."""
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip():
            yield text


def write_corpus(path: Path, megabytes: int) -> int:
    """Write at least `megabytes` of JSON lines, going over the files again where they do not suffice; the size."""
    import orjson

    size = 0
    with path.open("wb") as file:
        while size < megabytes * MEGABYTE:
            for text in texts():
                line = orjson.dumps({"text": text}) + b"\n"
                file.write(line)
                size += len(line)
                if size >= megabytes * MEGABYTE:
                    break
    return size


def tokenizer_folder(name: str) -> Path:
    """A real tokenizer's folder below JLLM_ASSETS, or the end of the benchmark with the reason."""
    import os

    folder = Path(os.environ.get("JLLM_ASSETS", Path.home() / ".cache" / "jllm-assets")) / "tokenizers" / name
    if not folder.is_dir():
        sys.exit(f'{{"benchmark": "raw2ids", "skipped": "no tokenizer {name}: set JLLM_ASSETS"}}')
    return folder
