"""Hostile folders, made on the spot: modules that leave a trace where they are run, links that lead elsewhere."""

import json
from pathlib import Path
from typing import Any

TRACE = "was-run"
MODULES = (
    *("transformers", "numpy", "torch", "jinja2", "orjson", "pyarrow", "click", "tokenizers", "deepspeed", "psutil"),
    *("json", "subprocess", "multiprocessing", "pickle", "struct", "socket", "dataclasses", "hashlib", "sitecustomize"),
)
"""Names that interpreters look for in the folder they are started in, if they look there at all."""


def plant_modules(folder: Path) -> Path:
    """Modules of well-known names, each of which leaves a file beside itself when it is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        code = f"open({str(folder / TRACE)!r}, 'a').write({name + ' '!r})\nraise SystemExit('run')\n"
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    return folder


def what_ran(folder: Path) -> str:
    """The names of the planted modules that were run."""
    trace = folder / TRACE
    return trace.read_text(encoding="utf-8") if trace.exists() else ""


def plant_link(at: Path, target: Path, content: str = "precious") -> Path:
    """A link that leads to a file of somebody else's, which `content` is in; gives that file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(content, encoding="utf-8")
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(target)
    return target


def configured(folder: Path, **fields: Any) -> Path:
    """A model folder with a `config.json` of a Llama and these fields."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 9}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **fields}), encoding="utf-8")
    return folder
