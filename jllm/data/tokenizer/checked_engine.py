"""The engine that a command uses: a fast one, proven equal to the reference engine, or the reference engine itself.

The fast engine gives the ids of the reference many times faster. It must prove that on this tokenizer: on difficult
strings whose ids came from AutoTokenizer itself, then on samples of the text that it encodes. A difference makes
`check` raise `EngineMismatchError`; whoever runs the engine then starts over with the reference.

Cost: a second to open the engines of a large vocabulary; a checked chunk costs the reference's time for
`CHECK_CHARACTERS`.
"""

import functools
from collections.abc import Sequence

import numpy as np

from jllm.data.dataset.columns import Int32, Int64
from jllm.data.sources.long_texts import LongText
from jllm.data.tokenizer.backend import marks_first_segment
from jllm.data.tokenizer.cutting import can_be_cut, encode_long, is_long
from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.engines import FastEngine, ReferenceEngine, SlowEngine, TokenizerEngine
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError

CHECK_CHARACTERS = 2048
"""This much text of a checked chunk is encoded by both engines."""
CHECK_EVERY = 4
"""The first chunks of a source are all checked, later ones every so often: some 30 times in the text of a shard."""


class EngineMismatchError(Exception):
    """The fast engine gave other ids than the reference."""


class CheckedEngine:
    """The engine that a command uses: it knows what it is, why, and checks itself as it goes.

    Attributes:
        name, version: of the engine that encodes.
        reason: why the fast engine is not used; empty where it is.
        probes: number of difficult strings on which the engine was proven when it was opened.

    Args:
        for_special: the engine for texts whose special tokens are parsed, where that is another one.
        backend: what the engine was built from, where long texts may be cut.
    """

    def __init__(
        self,
        engine: TokenizerEngine,
        reference: ReferenceEngine | None,
        *,
        reason: str,
        probes: int,
        for_special: TokenizerEngine | None = None,
        backend: str | None = None,
    ) -> None:
        self.engine = engine
        self.name, self.version = engine.name, engine.version
        self.reason = reason
        self.probes = probes
        self._reference = reference
        self._for_special = for_special or engine
        self._backend = backend

    def load(self) -> None:
        """Load now what checks need, so that processes that are forked share it."""
        if self._reference is not None:
            self._reference.load()

    @functools.cached_property
    def _can_cut(self) -> bool:
        return self._backend is not None and can_be_cut(self._backend)

    def encode(self, texts: Sequence[str | LongText], *, parse_special: bool = False) -> tuple[Int32, Int64]:
        """Ids of texts one after the other, and where each begins and the last one ends."""
        engine = self._for_special if parse_special else self.engine

        def encode(given: list[str]) -> tuple[Int32, Int64]:
            return engine.encode(given, parse_special=parse_special)

        if any(map(is_long, texts)) and self._can_cut:
            return encode_long(texts, encode)
        return encode([text if isinstance(text, str) else text.whole for text in texts])

    def check(self, texts: Sequence[str | LongText], *, parse_special: bool = False, chunk: int = 0) -> int:
        """Encode a sample of `texts` by both engines; the number of texts compared, 0 where this chunk has no turn.

        The sample is one stretch of `CHECK_CHARACTERS` characters of one text, or several short texts; which ones
        depends on the texts alone.

        Args:
            chunk: number of the chunk in its source that the texts come from.

        Raises:
            EngineMismatchError: the ids differ.
        """
        if self._reference is None or self._reference is self.engine or not texts or not has_turn(chunk):
            return 0
        sample = sample_of([text if isinstance(text, str) else text.sample for text in texts])
        given, given_offsets = self.encode(sample, parse_special=parse_special)
        wanted, wanted_offsets = self._reference.encode(sample, parse_special=parse_special)
        if not (np.array_equal(given, wanted) and np.array_equal(given_offsets, wanted_offsets)):
            raise EngineMismatchError(f"{self.name} {self.version} differs from hf on {sample[0][:40]!r}")
        return len(sample)

    def reference_ids(self, text: str, *, chunk: int = 0) -> Int32 | None:
        """The ids of a whole rendered conversation by the reference; None for a tokenizer without one, and where this
        chunk has no turn to be checked."""
        return None if self._reference is None or not has_turn(chunk) else self._reference.whole(text)

    def tokens_of_bytes(self, text: str, start: int, end: int, *, marks_first: bool = False) -> list[tuple[int, int]]:
        """Stretches of the text's tokens that overlap these bytes, by the reference engine's offsets; `marks_first` as
        there."""
        assert self._reference is not None
        data = text.encode()
        first, last = len(data[:start].decode()), len(data[:end].decode())
        spans = self._reference.token_spans(text, marks_first=marks_first)
        inside = [i for i, (begin, stop) in enumerate(spans) if begin < last and stop > first]
        return [(i, i + 1) for i in inside]


def has_turn(chunk: int) -> bool:
    """Whether a chunk, by its number in its source, is one of those that are checked."""
    return chunk < CHECK_EVERY or chunk % CHECK_EVERY == 0


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


def open_engine(
    facts: TokenizerFacts,
    choice: str = "auto",
    *,
    inert: bool = False,
    trust_remote_code: bool = False,
    early: EarlyEngines | None = None,
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
    checked = functools.partial(CheckedEngine, backend=None if inert else facts.backend)
    if choice == "hf":
        return checked(reference, reference, reason="asked for", probes=_proven(reference, facts, inert, False))
    try:
        fast = found[0] or FastEngine(facts.backend, inert=inert)
        proven = _proven(fast, facts, inert, False)
    except (ValueError, EngineMismatchError) as error:
        if choice == "fastokens":
            raise UserError(f"--engine fastokens: cannot run {facts.name} ({error}); use --engine hf or auto") from None
        proven = _proven(reference, facts, inert, False)
        return checked(reference, reference, reason=str(error), probes=proven)
    try:
        proven += 0 if inert else _proven(fast, facts, inert, True)
    except EngineMismatchError:
        return checked(fast, reference, reason="", probes=proven, for_special=reference)
    return checked(fast, reference, reason="", probes=proven)


def check_for_chat(facts: TokenizerFacts) -> None:
    """Raises:
    UserError: this tokenizer cannot encode conversations.
    """
    if facts.backend is None:
        raise UserError(
            f"--tokenizer {facts.name}: is Python code without a fast backend, which says what part of a conversation a"
            " token stands for; for -t ft use a tokenizer that has, or can be saved with, a tokenizer.json"
        )


def _proven(engine: TokenizerEngine, facts: TokenizerFacts, inert: bool, parse_special: bool) -> int:
    """Hold an engine to the ids that AutoTokenizer gave; the number of comparisons.

    Raises:
        EngineMismatchError: some ids differ.
    """
    pairs = list(zip(facts.probes, facts.probe_special_ids if parse_special else facts.probe_ids, strict=True))
    if inert:
        # Added tokens in the strings are treated differently then, and AutoTokenizer has no word for that; nor are
        # first segments marked.
        if marks_first_segment(facts.pre_tokenizer):
            return 0
        added = [token["content"] for token in facts.added]
        pairs = [pair for pair in pairs if not any(content in pair[0] for content in added)]
    ids, offsets = engine.encode([text for text, _ in pairs], parse_special=parse_special)
    for (text, row), start, end in zip(pairs, offsets[:-1], offsets[1:], strict=True):
        if tuple(ids[start:end].tolist()) != row:
            raise EngineMismatchError(f"{engine.name} {engine.version} differs from AutoTokenizer on {text[:40]!r}")
    return len(pairs)
