"""What the commands of the pages are given, in small: files and folders under the names that the pages use."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from jllm.commands import manifest
from tests.data.foreign_sets import ids, write
from tests.data.raw2ids_runs import documents, raw2ids, write_jsonl
from tests.data.tokenizers_for_tests import make_byte_tokenizer
from tests.fixtures import tiny_llama
from tests.models.legacy.published import publish
from tests.pages.blocks import ROOT

CHATML = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{{- '<|im_end|>\\n' }}{%- endfor %}"""
VOCABULARY = 410
DOCUMENTS = 60


def _tokenizer(path: Path) -> None:
    make_byte_tokenizer(path, chat_template=CHATML)


def _model(path: Path) -> None:
    tiny_llama(path, tied=False, vocabulary=VOCABULARY)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    _tokenizer(path)


def _documents(path: Path) -> None:
    write_jsonl(path, documents(DOCUMENTS, seed=len(path.name)))


def _parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": documents(DOCUMENTS, seed=4)}), path)


def _chats(path: Path) -> None:
    texts = documents(40, seed=3)
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [[{"user": question}, {"assistant": answer}] for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _pairs(path: Path) -> None:
    rows = [{"prompt": f"q {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _folder_of_chats(path: Path) -> None:
    path.mkdir()
    _chats(path / "talk.jsonl")


def _set(path: Path) -> None:
    """A data set of one file, made by raw2ids."""
    work = path.with_name(f".{path.name}-is-made-of-this")
    work.mkdir(parents=True)
    _tokenizer(work / "model")
    _documents(work / f"{path.name}.jsonl")
    words = ["--tokenizer", work / "model", "-t", "pretrain", "--max_len", 129]
    raw2ids("-i", work / f"{path.name}.jsonl", "-o", path, *words)


def _foreign(path: Path) -> None:
    """A folder of one file that another program wrote."""
    rows = [[number % VOCABULARY, 5, 7, 9] for number in range(30)]
    tags = pa.array([["forum", "news"][number % 2] for number in range(30)])
    write(path / "part-00000-a1.c000.snappy.parquet", {"input_ids": ids(rows), "source": tags})


def _sets(path: Path) -> None:
    """Two data sets, one file each: of ours, and of another program, described."""
    _set(path / "wiki")
    _foreign(path / "web")
    manifest.main([str(path / "web")], standalone_mode=False)


def _of_repository(path: Path) -> None:
    path.symlink_to(ROOT / path.name)


def _environment(path: Path) -> None:
    path.symlink_to(Path(sys.executable).parents[1])


INPUTS: dict[str, Callable[[Path], object]] = {
    ".venv": _environment,
    "D": _sets,
    "DATA": _set,
    "EVAL": _set,
    "FOLDER": _foreign,
    "MODEL": _model,
    "Makefile": _of_repository,
    "T": _tokenizer,
    "books.jsonl": _documents,
    "chats": _folder_of_chats,
    "chats.jsonl": _chats,
    "corpus.jsonl": _documents,
    "good.jsonl": _documents,
    "bad.jsonl": _documents,
    "other.jsonl": _documents,
    "pairs.jsonl": _pairs,
    "corpus.parquet": _parquet,
    "corpus/wiki.jsonl": _documents,
    "data-eval": _set,
    "jllm": _of_repository,
    "models/Qwen-7B": lambda path: publish("qwen", path),
    "models/Qwen3-8B": _model,
    "qwen3": _model,
    "spark_jobs": _of_repository,
    "tools": _of_repository,
}
"""Name in a page → what makes the file or folder."""


def lay_out(folder: Path, text: str) -> None:
    """Make, in `folder`, every input whose name occurs in `text`."""
    for name, make in INPUTS.items():
        if re.search(rf"(?<![\w/.-])(?:\./)?{re.escape(name)}(?![\w-]|\.\w)", text):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            make(folder / name)
