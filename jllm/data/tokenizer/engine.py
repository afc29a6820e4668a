"""Text to ids: a fast engine, proven equal to the reference engine, or the reference engine itself.

The reference is Hugging Face `tokenizers` running the backend that AutoTokenizer made (`jllm.data.tokenizer.facts`).
The fast engine, fastokens, gives the same ids 10 to 60 times faster and as flat buffers; it must prove that on this
tokenizer: on difficult strings whose ids came from AutoTokenizer itself, then on a sample of the text of every block.
A difference makes `check` raise `EngineMismatchError`; whoever runs the engine then starts over with the reference.

No Python object per token exists on the fast path: the engine's buffers become numpy arrays without a copy.

Cost: a second and some hundred MB for a large vocabulary (Qwen3: 152 k entries); both engines release the interpreter
lock while they encode, so threads of one process share the tables.
"""

import json
import os
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from jllm.data.dataset.shards import Int32, Int64
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError

if TYPE_CHECKING:
    from jllm.data.tokenizer.early import EarlyEngines

ENGINES = ("auto", "fastokens", "hf")
CHECK_CHARACTERS = 2048
"""This much text of a checked block is encoded by both engines; the reference takes 2 ms for it."""
CHECK_EVERY = 4
"""The first blocks of a source are all checked, later ones every so often: some 30 times in the text of a shard."""


class EngineMismatchError(Exception):
    """The fast engine gave other ids than the reference."""


class Engine(Protocol):
    """Encodes texts to one flat array of ids and the offsets of each text in it."""

    name: str
    version: str

    def encode(self, texts: list[str], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        """Ids of all texts, without the tokenizer's prefix and suffix.

        Args:
            texts: anything that is valid UTF-8.
            parse_special: special tokens inside a text become their ids; otherwise they are ordinary text.
        """
        ...


class ReferenceEngine:
    """Hugging Face `tokenizers`.

    Args:
        backend: the serialised backend.
        inert: treat added tokens inside a text as ordinary text, the special ones and the others alike.
    """

    name = "hf"

    def __init__(self, backend: str, *, inert: bool = False) -> None:
        import tokenizers

        self.version = tokenizers.__version__
        self.inert = inert
        self._serialised = backend
        # An instance for each way of encoding, because that is a setting of the instance and threads share the engine.
        self._backends: dict[tuple[bool, bool], Any] = {}
        self._lock = threading.Lock()

    def _backend(self, inert: bool, parse_special: bool) -> Any:
        with self._lock:
            if (inert, parse_special) not in self._backends:
                import tokenizers

                text = rewritten(self._serialised, as_inert) if inert else self._serialised
                backend = tokenizers.Tokenizer.from_str(text)
                backend.no_truncation()
                backend.no_padding()
                backend.encode_special_tokens = not parse_special
                self._backends[inert, parse_special] = backend
            return self._backends[inert, parse_special]

    def load(self) -> None:
        """Load now what checking the fast engine needs, half a second for a large vocabulary, and not when the first
        text comes: whole conversations with their control tokens where `inert`, else ordinary text."""
        self._backend(False, parse_special=self.inert)

    def encode(self, texts: list[str], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        encodings = self._backend(self.inert, parse_special).encode_batch_fast(texts, add_special_tokens=False)
        return _flat([encoding.ids for encoding in encodings])

    def whole(self, text: str) -> Int32:
        """Ids of a text in which all control tokens are parsed, as AutoTokenizer encodes a rendered conversation."""
        ids = self._backend(False, True).encode(text, add_special_tokens=False).ids
        return np.array(ids, dtype=np.int32)

    def token_spans(self, text: str) -> list[tuple[int, int]]:
        """The characters of the text that each of its tokens stands for."""
        spans: list[tuple[int, int]] = self._backend(self.inert, False).encode(text, add_special_tokens=False).offsets
        return spans

    def forget(self) -> None:
        """Give the memory of the instances back; they are made again when they are needed."""
        self._backends.clear()


class SlowEngine:
    """A tokenizer that exists only as Python code (no fast backend): AutoTokenizer itself, one text at a time."""

    name = "hf"

    def __init__(self, facts: TokenizerFacts, *, trust_remote_code: bool = False) -> None:
        import transformers

        self.version = f"{transformers.__version__} (slow)"
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(facts.path, trust_remote_code=trust_remote_code)
        self._lock = threading.Lock()

    def encode(self, texts: list[str], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        with self._lock:
            rows = [
                self._tokenizer(text, add_special_tokens=False, split_special_tokens=not parse_special).input_ids
                for text in texts
            ]
        return _flat(rows)


class FastEngine:
    """fastokens, built from the serialised backend; see `for_fastokens` for what is rewritten and why.

    Raises:
        ValueError: fastokens cannot run this tokenizer; the message says why.
    """

    name = "fastokens"

    def __init__(self, backend: str, *, inert: bool = False) -> None:
        import importlib.metadata

        import fastokens

        self.version = importlib.metadata.version("fastokens")
        native: Any = fastokens._native
        changes = [as_inert, for_fastokens] if inert else [for_fastokens]
        self._tokenizer = native.Tokenizer.from_json_str(with_short_merges(rewritten(backend, *changes)))

    def encode(self, texts: list[str], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        ids, offsets = self._tokenizer.encode_batch_flat(
            texts, add_special_tokens=False, split_special_tokens=not parse_special
        )
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64)


_HEAD = re.compile(
    r'\s*\{\s*"version"\s*:\s*"1\.0"\s*,\s*"truncation"\s*:\s*null\s*,\s*"padding"\s*:\s*null\s*,\s*"added_tokens"\s*:\s*'
)


def rewritten(backend: str, *changes: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """A serialised backend after these changes: `as_inert`, `for_fastokens`.

    Without a Metaspace pre-tokenizer they concern nothing but truncation, padding and the added tokens, which stand
    at the beginning: then the vocabulary behind them, some 10 MB, is not parsed.
    """
    head = _HEAD.match(backend)
    if head is None or '"Metaspace"' in backend:
        value = fast_json.loads(backend)
        for change in changes:
            value = change(value)
        return fast_json.dumps(value)
    tokens, end = json.JSONDecoder().raw_decode(backend, head.end())
    value = {"truncation": None, "padding": None, "added_tokens": tokens, "pre_tokenizer": None}
    for change in changes:
        value = change(value)
    return backend[: head.end()] + fast_json.dumps(value["added_tokens"]) + backend[end:]


_MERGES = re.compile(r'"merges":\s*(?=\[\s*\[)')


def with_short_merges(backend: str) -> str:
    """A serialised backend whose merges are written as "a b" where they were ["a", "b"], if no token has a blank:
    fastokens reads them so much faster that rewriting them is paid back several times."""
    found = _MERGES.match(backend, backend.rfind('"merges":'))
    if found is None:
        return backend
    start, end = found.end(), backend.rfind("]") + 1
    try:
        merges = fast_json.loads(backend[start:end])
        short = fast_json.dumps([" ".join(merge) for merge in merges if isinstance(merge, list)])
    except (ValueError, TypeError):  # something stands behind the merges, or in them: the engine will say what
        return backend
    return backend[:start] + short + backend[end:] if merges and short.count(" ") == len(merges) else backend


def for_fastokens(value: dict[str, Any]) -> dict[str, Any]:
    """A backend, changed into what fastokens reads: a Metaspace pre-tokenizer becomes the normalizer it amounts to.

    transformers 5 gives Llama-2-like tokenizers a Metaspace pre-tokenizer that does not split: every piece of text
    gets a "▁" in front unless it starts with one, after its spaces became "▁". Two Replace normalizers say the same.
    """
    value["truncation"] = value["padding"] = None
    pre = value["pre_tokenizer"]
    if pre and pre["type"] == "Metaspace":
        mark, scheme = pre["replacement"], pre["prepend_scheme"]
        if pre.get("split", True):
            raise ValueError("a Metaspace pre-tokenizer that splits")
        if scheme == "first" and any(not token["special"] for token in value["added_tokens"]):
            raise ValueError("a Metaspace pre-tokenizer that marks the first piece only")
        steps = [value["normalizer"]] if value["normalizer"] else []
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": mark})
        if scheme != "never":
            steps.append({"type": "Replace", "pattern": {"Regex": rf"\A(?!{mark})"}, "content": mark})
        value["normalizer"] = {"type": "Sequence", "normalizers": steps}
        value["pre_tokenizer"] = None
    return value


def marks_first_piece(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether only the first piece of a text, of those between its control tokens, gets a "▁" in front."""
    return bool(pre_tokenizer and pre_tokenizer["type"] == "Metaspace" and pre_tokenizer["prepend_scheme"] == "first")


def as_inert(value: dict[str, Any]) -> dict[str, Any]:
    """A backend, changed: every added token is special, so that encoding special tokens as text covers all of them."""
    for token in value["added_tokens"]:
        token["special"] = True
    if marks_first_piece(
        value["pre_tokenizer"]
    ):  # the pieces of a conversation are encoded apart; `Assembler.assemble` marks the first one
        value["pre_tokenizer"]["prepend_scheme"] = "never"
    return value


def _flat(rows: list[list[int]]) -> tuple[Int32, Int64]:
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.empty(offsets[-1], dtype=np.int32)
    for row, start in zip(rows, offsets, strict=False):
        ids[start : start + len(row)] = row
    return ids, offsets


class CheckedEngine:
    """The engine that a command uses: it knows what it is, why, and checks itself as it goes.

    Attributes:
        name, version: of the engine that encodes.
        reason: why the fast engine is not used; empty where it is.
        probes: number of difficult strings on which the engine was proven when it was opened.

    Args:
        for_special: the engine for texts whose special tokens are parsed, where that is another one.
    """

    def __init__(
        self,
        engine: Engine,
        reference: ReferenceEngine | None,
        *,
        reason: str,
        probes: int,
        for_special: Engine | None = None,
    ) -> None:
        self.engine = engine
        self.name, self.version = engine.name, engine.version
        self.reason = reason
        self.probes = probes
        self._reference = reference
        self._for_special = for_special or engine

    def encode(self, texts: list[str], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        return (self._for_special if parse_special else self.engine).encode(texts, parse_special=parse_special)

    def check(self, texts: list[str], *, parse_special: bool = False, block: int = 0) -> int:
        """Encode a sample of `texts` by both engines; the number of texts compared, 0 where this block has no turn.

        The sample is one stretch of `CHECK_CHARACTERS` characters of one text, or several short texts; which ones
        depends on the texts alone.

        Args:
            block: number of the block in its source that the texts come from.

        Raises:
            EngineMismatchError: the ids differ.
        """
        if self._reference is None or self._reference is self.engine or not texts or not has_turn(block):
            return 0
        sample = sample_of(texts)
        given, given_offsets = self.encode(sample, parse_special=parse_special)
        wanted, wanted_offsets = self._reference.encode(sample, parse_special=parse_special)
        if not (np.array_equal(given, wanted) and np.array_equal(given_offsets, wanted_offsets)):
            raise EngineMismatchError(f"{self.name} {self.version} differs from hf on {sample[0][:40]!r}")
        return len(sample)

    def reference_ids(self, text: str, *, block: int = 0) -> Int32 | None:
        """The ids of a whole rendered conversation by the reference; None for a tokenizer without one, and where this
        block has no turn to be checked."""
        return None if self._reference is None or not has_turn(block) else self._reference.whole(text)

    def tokens_of_bytes(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """Stretches of the text's tokens that overlap these bytes, by the reference engine's offsets."""
        assert self._reference is not None
        data = text.encode()
        first, last = len(data[:start].decode()), len(data[:end].decode())
        spans = self._reference.token_spans(text)
        inside = [i for i, (begin, stop) in enumerate(spans) if begin < last and stop > first]
        return [(i, i + 1) for i in inside]


def has_turn(block: int) -> bool:
    """Whether a block, by its number in its source, is one of those that are checked."""
    return block < CHECK_EVERY or block % CHECK_EVERY == 0


def sample_of(texts: list[str]) -> list[str]:
    """Up to `CHECK_CHARACTERS` characters of `texts`, from a place that depends on the texts alone."""
    total = sum(map(len, texts))
    at = total * 2654435761 // 97 % len(texts)
    sample, room = [], CHECK_CHARACTERS
    for text in texts[at:] + texts[:at]:
        begin = 0 if len(text) <= room else (total * 40503) % (len(text) - room + 1)
        sample.append(text[begin : begin + room])
        room -= len(sample[-1])
        if room <= 0 or len(sample) == 64:
            break
    return sample


def use_cores(cores: int) -> None:
    """Limit the threads of both engines; takes effect before the first text is encoded in this process."""
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def open_engine(
    facts: TokenizerFacts,
    choice: str = "auto",
    *,
    inert: bool = False,
    trust_remote_code: bool = False,
    early: "EarlyEngines | None" = None,
) -> CheckedEngine:
    """The engine for a tokenizer: the fast one where it proves itself, else the reference.

    Args:
        choice: `auto`, or an engine by name, which then is used or refused.
        inert: for chat: all added tokens inside a text are ordinary text.
        early: engines that may have been built already.

    Raises:
        UserError: the engine asked for cannot run this tokenizer or fails its proof.
    """
    if inert:
        check_for_chat(facts)
    if facts.backend is None:
        if choice == "fastokens":
            raise UserError(f"--engine fastokens: {facts.name} has no fast backend; use --engine hf or auto")
        slow = SlowEngine(facts, trust_remote_code=trust_remote_code)
        return CheckedEngine(slow, None, reason="the tokenizer has no fast backend", probes=0)
    found = early.engines_of(facts.backend) if early else (None, None)
    reference = found[1] or ReferenceEngine(facts.backend, inert=inert)
    if choice == "hf":
        return CheckedEngine(reference, reference, reason="asked for", probes=_proven(reference, facts, inert, False))
    try:
        fast = found[0] or FastEngine(facts.backend, inert=inert)
        proven = _proven(fast, facts, inert, False)
    except (ValueError, EngineMismatchError) as error:
        if choice == "fastokens":
            raise UserError(f"--engine fastokens: cannot run {facts.name} ({error}); use --engine hf or auto") from None
        proven = _proven(reference, facts, inert, False)
        return CheckedEngine(reference, reference, reason=str(error), probes=proven)
    try:
        proven += 0 if inert else _proven(fast, facts, inert, True)
    except EngineMismatchError:
        return CheckedEngine(fast, reference, reason="", probes=proven, for_special=reference)
    return CheckedEngine(fast, reference, reason="", probes=proven)


def check_for_chat(facts: TokenizerFacts) -> None:
    """Raises:
    UserError: this tokenizer cannot encode conversations.
    """
    if facts.backend is None:
        raise UserError(
            f"--tokenizer {facts.name}: is Python code without a fast backend, which says what part of a conversation a"
            " token stands for; for -t ft use a tokenizer that has, or can be saved with, a tokenizer.json"
        )


def _proven(engine: Engine, facts: TokenizerFacts, inert: bool, parse_special: bool) -> int:
    """Hold an engine to the ids that AutoTokenizer gave; the number of comparisons.

    Raises:
        EngineMismatchError: some ids differ.
    """
    pairs = list(zip(facts.probes, facts.probe_special_ids if parse_special else facts.probe_ids, strict=True))
    if inert:
        # Added tokens in the strings are treated differently then, and AutoTokenizer has no word for that; nor are
        # first pieces marked.
        if marks_first_piece(facts.pre_tokenizer):
            return 0
        added = [token["content"] for token in facts.added]
        pairs = [pair for pair in pairs if not any(content in pair[0] for content in added)]
    ids, offsets = engine.encode([text for text, _ in pairs], parse_special=parse_special)
    for (text, row), start, end in zip(pairs, offsets[:-1], offsets[1:], strict=True):
        if tuple(ids[start:end].tolist()) != row:
            raise EngineMismatchError(f"{engine.name} {engine.version} differs from AutoTokenizer on {text[:40]!r}")
    return len(pairs)
