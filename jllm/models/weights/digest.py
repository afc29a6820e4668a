"""Hashes of the weights of a model folder, to see whether two folders hold the same: a short one by samples, and a
whole one.

Guarantees, of the short one: names, dtypes, shapes and sampled bytes of every tensor count, and nothing of how the
files are cut. A change between the samples is not seen: this finds another model or another state of training, not a
flipped bit.
Cost: the headers, and `SAMPLES` short reads for each tensor; the whole one reads all, several files at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jllm.models.weights.source import pickled_files, read_header, weight_files

SAMPLES = 4
SAMPLE_BYTES = 256
READ_BYTES, THREADS = 1 << 22, 8
_LAYER = re.compile(r"(.*?\.\d+)\.")


def weights_digest(folder: Path) -> dict[str, str]:
    """Part of the model (a layer, or a tensor outside of all) → hash of what the files hold of it.

    Raises:
        UserError: there are no weights, or a file is not what it should be.
    """
    return files_digest(weight_files(folder), pickled_files(folder))


def files_digest(files: Iterable[Path], pickled: Iterable[Path] = ()) -> dict[str, str]:
    """The same of safetensors files, and of pickled ones, each of which is a part."""
    parts: dict[str, list[tuple[str, bytes]]] = {}
    for path in files:
        header = read_header(path)
        with path.open("rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                found = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
                for sample in _samples(file.fileno(), begin + start, begin + end):
                    found.update(sample)
                layer = _LAYER.match(name)
                parts.setdefault(layer[1] if layer else name, []).append((name, found.digest()))
    for path in pickled:
        size = path.stat().st_size
        with path.open("rb") as file:
            found = hashlib.sha256(b"".join(_samples(file.fileno(), 0, size)))
        parts[path.name] = [(str(size), found.digest())]
    return {part: _together(tensors) for part, tensors in sorted(parts.items())}


def weights_sha256(folder: Path) -> str:
    """sha256 over every byte of a model folder's weights: any change of any number changes it, and how the files are
    cut does not.

    Raises:
        UserError: as `weights_digest`.
    """
    return files_sha256(weight_files(folder), pickled_files(folder))


def files_sha256(files: Iterable[Path], pickled: Iterable[Path] = ()) -> str:
    """The same of safetensors files, and of pickled ones as a whole."""
    pickled = list(pickled)
    with ThreadPoolExecutor(THREADS) as pool:
        tensors = [each for found in pool.map(_tensors_of, files) for each in found]
        tensors += [(path.name, digest) for path, digest in zip(pickled, pool.map(_sha256_of, pickled), strict=True)]
    return hashlib.sha256(json.dumps(sorted(tensors)).encode()).hexdigest()


def _tensors_of(path: Path) -> list[tuple[str, str]]:
    """Name and hash of each tensor of a safetensors file."""
    header, found = read_header(path), []
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
            file.seek(begin + start)
            for left in range(end - start, 0, -READ_BYTES):
                digest.update(file.read(min(left, READ_BYTES)))
            found.append((name, digest.hexdigest()))
    return found


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _samples(file: int, start: int, end: int) -> Iterable[bytes]:
    """Bytes spread evenly over [start, end), the first and the last among them."""
    room = max(0, end - start - SAMPLE_BYTES)
    places = sorted({start + room * each // (SAMPLES - 1) for each in range(SAMPLES)})
    return [os.pread(file, min(SAMPLE_BYTES, end - place), place) for place in places]


def _together(tensors: list[tuple[str, bytes]]) -> str:
    found = hashlib.sha256()
    for name, digest in sorted(tensors):
        found.update(name.encode() + b"\0" + digest)
    return found.hexdigest()[:12]
