"""Engines built while a command still gets ready: the fast one on a thread, the reference beside it.

They are built from AutoTokenizer's backend where an earlier command left it, else from `tokenizer.json` while
AutoTokenizer is loading in its own process; then they are used only if its backend encodes as the file does. For most
tokenizers it does; where it does not (Llama 2), the work was for nothing.

Cost: none; it hides the second that a large vocabulary takes behind what else takes time. The reference holds the
interpreter lock while it is built; it is begun when nothing else waits for the lock, the fast engine neither.
"""

import threading
from pathlib import Path
from typing import Any

from jllm.data.tokenizer.backend import encoding_of
from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine
from jllm.data.tokenizer.facts import TokenizerFacts, known_facts


def begun_at_once(name: str, *, inert: bool) -> "EarlyEngines | None":
    """Engines of a tokenizer that an earlier command left something of, begun before a command has loaded what it
    works with; None where there is nothing."""
    known = known_facts(name)
    return None if known is None or known.backend is None else EarlyEngines(name, inert=inert, known=known)


class EarlyEngines:
    """See the module.

    Args:
        name: the tokenizer's folder, or its name on the hub, of which nothing is known yet.
        inert: as for the engines.
        known: what is known of the tokenizer already.
    """

    def __init__(self, name: str, *, inert: bool, known: TokenizerFacts | None = None) -> None:
        self._inert = inert
        self._backend = known.backend if known is not None else None
        self._fast: FastEngine | None = None
        self._reference: ReferenceEngine | None = None
        self._meaning: Any = None
        self._threads: list[threading.Thread] = []
        self._needs_no_lock = threading.Event()
        path = Path(name, "tokenizer.json")
        if self._backend is None and path.is_file():
            self._text = path.read_bytes().decode(errors="replace")
        elif self._backend is not None:
            self._text = self._backend
        else:
            return
        builds = [self._build]
        if self._backend is None:  # this process has nothing to do but wait for AutoTokenizer
            builds.append(self._build_reference)
        # Not daemons: one that is inside an engine's library when the interpreter ends aborts the process.
        self._threads = [threading.Thread(target=build) for build in builds]
        for thread in self._threads:
            thread.start()

    # Whatever goes wrong in these two will be said when the real backend is tried.

    def _build(self) -> None:
        try:
            self._fast = FastEngine(self._text, inert=self._inert, before_building=self._needs_no_lock.set)
            if self._backend is None:
                self._meaning = encoding_of(self._text)
        except Exception:
            self._fast = None
        finally:
            self._needs_no_lock.set()

    def _build_reference(self) -> None:
        self._needs_no_lock.wait()
        try:
            reference = ReferenceEngine(self._text, inert=self._inert)
            reference.load()
            self._reference = reference
        except Exception:
            self._reference = None

    def fits(self, *, inert: bool, known: TokenizerFacts | None) -> bool:
        """Whether it is what these would make; where it is not, it is waited for, for nothing of it may be going on
        when processes are forked."""
        same = known is not None and self._backend == known.backend and self._inert == inert
        for thread in () if same else self._threads:
            thread.join()
        return same

    def engines_of(self, backend: str) -> tuple[FastEngine | None, ReferenceEngine | None]:
        """Those engines that are there and encode as this backend does."""
        if self._backend is not None and self._reference is None:
            self._build_reference()
        for thread in self._threads:
            thread.join()
        if not self._threads or (backend != self._backend and self._meaning != encoding_of(backend)):
            return None, None
        return self._fast, self._reference
