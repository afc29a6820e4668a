"""The operator that DeepSpeed compiles for runs on CPU: built once, and loaded by later runs.

It lies in the user's cache folder (`jllm.guards.caches`), one build for each environment, with the checksum of what was
built beside it. A library without it, or with another one, was cut short or changed: it is built anew.

Cost: half a minute for the first run of an environment; a hash over some hundred KB for later ones.
"""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from jllm.atomic import remove_tree
from jllm.errors import UserError
from jllm.guards import caches

_FOLDER = "TORCH_EXTENSIONS_DIR"
_BUILDING, _SUMS = ".building", ".sha256"


def compile_for_cpu() -> None:
    """Build, or load from the cache, the shared-memory operator that DeepSpeed's CPU backend starts with.

    Raises:
        UserError: it cannot be compiled.
    """
    from deepspeed.accelerator import get_accelerator

    # PyTorch keeps one build for each user; two environments would each rebuild what the other has just built.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    own = str(caches.private_folder("torch_extensions") / environment)
    is_ours = os.environ.get(_FOLDER) in (None, "", own)
    if is_ours:
        os.environ[_FOLDER] = own
    # One ninja for every way to start a run: another version does not trust the build of this one, and starts over.
    own_programs = Path(sys.prefix) / "bin"
    if (own_programs / "ninja").is_file():
        os.environ["PATH"] = f"{own_programs}{os.pathsep}{os.environ.get('PATH', '')}"
    # It warns of a compiler that is not there, at length, before the error that says so.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), _building_alone(builder.name) as folder:
            if is_ours:
                forget_changed(folder)
            builder.load()
            if is_ours:
                remember(folder)
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"training on CPU compiles a DeepSpeed operator ({builder.name}), which failed: {reason[:200]};"
            " install a C++ compiler (such as the package g++) and ninja, or set CXX to the compiler"
        ) from None


def forget_changed(folder: Path) -> None:
    """Remove a build whose libraries are not what `remember` wrote down."""
    try:
        known = (folder / _SUMS).read_text(encoding="utf-8")
    except (OSError, ValueError):
        known = ""
    if known and known == _sums(folder):
        return
    for path in folder.iterdir():
        if path.name != _BUILDING:
            remove_tree(path)


def remember(folder: Path) -> None:
    """Write down the checksums of the libraries of a build, where they are not yet."""
    sums, at = _sums(folder), folder / _SUMS
    with contextlib.suppress(OSError):  # then the next run builds anew
        if not at.is_file() or at.read_text(encoding="utf-8") != sums:
            at.write_text(sums, encoding="utf-8")


def _sums(folder: Path) -> str:
    return "".join(f"{caches.checksum(path)}  {path.name}\n" for path in sorted(folder.glob("*.so")))


@contextlib.contextmanager
def _building_alone(name: str) -> Iterator[Path]:
    """Hold an operator's build folder.

    PyTorch marks a running build by a file and waits for ever for one that a killed build left behind. The kernel's
    lock ends with the process that holds it, so whoever holds it knows such a file to be stale.
    """
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(name, verbose=False))
    with (folder / _BUILDING).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield folder
