"""Interpreters that run no code of the working folder: this process, and every child that is Python.

Python looks for modules in the working folder first under `-m` and `-c`, and where PYTHONPATH has an empty entry. A
downloaded folder may hold a module `numpy`. So the folder leaves `sys.path` before anything of ours is imported, unless
the package lies there itself (a checkout) or PYTHONPATH names it; and children are started with `-P` in an
environment that says the same to children of theirs, such as those of a launcher.

A package of one file, which imports nothing of ours: it is there before anything else may be.

Guarantees: what PYTHONPATH names is found as before, and a child finds this very package. Only what Python itself
imports before it comes to us under `python -m` is out of reach (docs/security.md).
Cost: nothing; only `os` and `sys` are imported, which every interpreter has before it looks into the folder.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
"""The folder that the package is imported from."""
SAFE_PATH, SEARCH_PATH = "PYTHONSAFEPATH", "PYTHONPATH"
PLACES = ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "TORCH_EXTENSIONS_DIR", "HF_HOME")
"""Variables that name a folder for what libraries keep. Taken for a path, an empty one is the working folder, and so is
what a relative one of XDG leads to; the XDG specification has both count as unset."""


def python(*arguments: str) -> list[str]:
    """The command line of a child interpreter; start it in `environment()`."""
    return [sys.executable, "-P", *arguments]


def environment(given: "Mapping[str, str] | None" = None) -> dict[str, str]:
    """The environment of a child interpreter: as it is given (this process's), without a way to the working folder."""
    found = dict(os.environ if given is None else given)
    for name in _misleading(found):
        del found[name]
    named = [os.path.abspath(entry) for entry in found.get(SEARCH_PATH, "").split(os.pathsep) if entry]
    if ROOT not in named and not _is_installed(ROOT):
        named.insert(0, ROOT)
    if named:
        found[SEARCH_PATH] = os.pathsep.join(named)
    else:
        found.pop(SEARCH_PATH, None)
    found[SAFE_PATH] = "1"
    return found


def seal() -> None:
    """Make this process one that runs no code of the working folder, nor will its children; for our own programs."""
    _leave_working_folder()
    sealed = environment()
    for name in _misleading(os.environ):
        del os.environ[name]
    for name in (SAFE_PATH, SEARCH_PATH):
        if name in sealed:
            os.environ[name] = sealed[name]
        else:
            os.environ.pop(name, None)


def _misleading(variables: "Mapping[str, str]") -> list[str]:
    """Those of `PLACES` that lead to the working folder."""
    given = [name for name in PLACES if name in variables]
    return [name for name in given if not (variables[name] and (os.path.isabs(variables[name]) or name[:3] != "XDG"))]


def is_our_program() -> bool:
    """Whether this process was started to run the package: as `python -m jllm...`, or by the command `jllm`."""
    started = getattr(sys, "argv", [""])[:1]
    return started == ["-m"] or [os.path.basename(name) for name in started] == ["jllm"]


def _leave_working_folder() -> None:
    try:
        here = os.getcwd()
    except OSError:  # which is gone
        return
    named = [os.path.abspath(entry) for entry in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if entry]
    if here == os.path.realpath(ROOT) or here in map(os.path.realpath, named) or _is_installed(here):
        return
    sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or os.curdir) != here]


def _is_installed(folder: str) -> bool:
    """Whether every interpreter of this environment finds modules there of itself."""
    site = sys.modules.get("site")
    places = [os.path.dirname(os.__file__), *(site.getsitepackages() if site else ())]
    return os.path.realpath(folder) in map(os.path.realpath, places)
