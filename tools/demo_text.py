"""Real text that every Python carries, as the input files of the demo.

    python tools/demo_text.py --output demo-run/text

Writes three files:
    train/topics.jsonl      the help topics of `pydoc_data.topics`: technical English, one `{"text": ...}` a line
    train/docstrings.txt    docstrings of the standard library; each paragraph is a document
    held-out/topics.jsonl   whole topics that training never sees

A topic is held out only if no other topic repeats one of its paragraphs: several topics are excerpts of others, and
holding such a one out would measure memory. Which topics those are is computed, so it holds for any Python version;
the same Python always gives the same files. Cost: well under a second.
"""

import ast
import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from pydoc_data.topics import topics  # type: ignore[import-not-found]

from jllm import atomic
from jllm.options import command, option

HELD_OUT_CHARACTERS = 16_000  # about 4,000 tokens: an evaluation takes seconds, not minutes, on two cores
LONGEST_HELD_OUT = 5_000  # so that many subjects are measured
MODULES = (
    *("argparse", "bisect", "calendar", "collections", "contextlib", "csv", "difflib", "enum", "functools", "heapq"),
    *("inspect", "json", "pathlib", "random", "shutil", "statistics", "string", "subprocess", "textwrap", "zipfile"),
)


@dataclass(frozen=True, kw_only=True)
class DemoTextConfig:
    output: Path = option(MISSING, "-o", help="folder for the three files", metavar="FOLDER")


@command(DemoTextConfig, name="demo_text")
def main(config: DemoTextConfig) -> None:
    """Write real text for the demo: help topics and docstrings of this Python, some topics held out."""
    held_out = choose_held_out(topics)
    files = {
        "train/topics.jsonl": as_jsonl(text for name, text in topics.items() if name not in held_out),
        "train/docstrings.txt": "\n\n".join(docstrings(MODULES)) + "\n",
        "held-out/topics.jsonl": as_jsonl(topics[name] for name in held_out),
    }
    for name, content in files.items():
        atomic.write_text(config.output / name, content)
        print(f"{config.output / name}: {len(content.encode()):,} bytes")
    print(f"held out: {', '.join(held_out)}")


def as_jsonl(texts: Iterable[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def choose_held_out(texts: dict[str, str]) -> list[str]:
    """Names of whole texts, spread over the alphabet, none of whose paragraphs stands in another text."""
    paragraphs = {name: set(long_paragraphs(text)) for name, text in texts.items()}
    owners = Counter(paragraph for owned in paragraphs.values() for paragraph in owned)
    alone = [
        name
        for name in sorted(texts)
        if len(texts[name]) <= LONGEST_HELD_OUT and all(owners[paragraph] == 1 for paragraph in paragraphs[name])
    ]
    every = 1
    while sum(len(texts[name]) for name in alone[::every]) > HELD_OUT_CHARACTERS:
        every += 1
    return alone[::every]


def long_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a text with white space made equal; short ones, such as headings, may be anywhere."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) >= 60:
            yield words


def docstrings(modules: Iterable[str]) -> Iterator[str]:
    """The docstrings in the sources of standard modules (nothing is imported); blank lines inside them stay."""
    library = Path(os.__file__).parent
    for name in modules:
        source = library / f"{name}.py"
        if not source.is_file():
            source = library / name / "__init__.py"
        if not source.is_file():  # this Python has no such module
            continue
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    yield inspect.cleandoc(text).strip()


if __name__ == "__main__":
    main()
