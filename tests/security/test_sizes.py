"""What a file says of its size is not believed: all ends in one line, in bounded memory."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import resolve
from jllm.data.sources.parsing import parse_chunk
from jllm.errors import UserError
from tests.data.tokenizers_for_tests import make_byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, 1),
    ".zst": lambda data: zstandard.ZstdCompressor(1).compress(data),
    ".xz": lambda data: lzma.compress(data, preset=0),
}


def records_of(path: Path, most: int) -> list[Any]:
    [source] = resolve([str(path)])
    found = [parse_chunk(chunk, source.kind) for chunk in read_chunks(source, 0, most=most)]
    return [value for records in found for value in records.values]


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6), most=st.integers(1, 40), blanks=st.integers(0, 2))
@pytest.mark.parametrize("form", ["text", "jsonl", "json"])
def test_the_first_record_that_is_too_large_is_named(
    tmp_path_factory: pytest.TempPathFactory, form: str, sizes: list[int], most: int, blanks: int
) -> None:
    texts = [f"{number}" + "a" * (size - 1) for number, size in enumerate(sizes)]
    path = tmp_path_factory.getbasetemp() / f"sizes.{form.replace('text', 'txt')}"
    if form == "text":
        path.write_text("\n" * blanks + "\n\n".join(texts) + "\n", encoding="utf-8")
        weights, lines = sizes, [1 + blanks + 2 * number for number in range(len(sizes))]
    else:
        rows = [json.dumps(text) for text in texts]
        whole = "\n" * blanks + "\n".join(rows) + "\n" if form == "jsonl" else f"[{','.join(rows)}]"
        path.write_text(whole, encoding="utf-8")
        weights = [size + 2 for size in sizes]
        lines = [1 + number + (blanks if form == "jsonl" else 0) for number in range(len(sizes))]
    over = [line for line, weight in zip(lines, weights, strict=True) if weight > most]
    if over:
        with pytest.raises(UserError, match=rf"^--max_record: the one at \S+:{over[0]} has more than {most} bytes"):
            records_of(path, most)
    else:
        assert records_of(path, most) == texts


@pytest.mark.parametrize("packing", list(PACKED))
@pytest.mark.parametrize("form", ["txt", "jsonl", "json"])
def test_what_never_ends_is_held_in_part_alone(tmp_path: Path, form: str, packing: str) -> None:
    """96 MiB of one record; some chunks of 4 MiB are held, and the 5 MB that a record may have."""
    head = {"txt": b"", "jsonl": b'{"text": "short"}\n{"text": "', "json": b'[{"text": "short"}, {"text": "'}[form]
    path = tmp_path / f"bomb.{form}{packing}"
    path.write_bytes(PACKED[packing](head + b"a" * (96 << 20)))
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"bomb\S+:{1 if form == 'txt' else 2} has more than 5,000,000 bytes"):
        records_of(path, 5_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 80 << 20


def test_the_command_names_place_and_option(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": "b" * 2000}) + "\n")
    tokenizer = make_byte_tokenizer(tmp_path / "bytes")
    command = [sys.executable, "-m", "jllm.raw2ids", "-t", "pretrain", "-i", str(tmp_path / "a.jsonl"), "-o",
               str(tmp_path / "out"), "--tokenizer", str(tokenizer), "--cores", "1"]  # fmt: skip

    def run(most: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, "--max_record", most], cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stderr

    for wrong in ("0", "x", "-1", ""):
        code, said = run(wrong)
        assert (code, said.count("\n")) == (2, 1)
        assert said.startswith("error: --max_record")
    code, said = run("1K")
    assert (code, said.count("\n")) == (2, 1)
    assert f"{tmp_path / 'a.jsonl'}:2 has more than 1,024 bytes; raise --max_record" in said
    assert run("1M") == (0, "")  # the same run goes on
