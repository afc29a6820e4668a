"""Chat records to rows of ids and labels.

Rendering is Python and runs in worker processes, which know neither the engine nor its tables; encoding runs in the
process that owns them, one call for all text of a block. Trained spans come as bytes of the text and become tokens
through a table of the length of every token, for texts that the tokenizer does not change (`lengths.py`); for others
the reference engine's offsets decide.

A token is trained on when any part of it lies in a trained span, as in transformers.

Cost: about 20 MB/s of JSON on one core, and as much more for each further core; no Python object per token.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.chat.render_workers import Rendered, render_block
from jllm.data.chat.rendering import RenderPlan
from jllm.data.dataset.shards import IGNORE_INDEX, Int32, Int64
from jllm.data.packing.packers import Documents
from jllm.data.prepare.encoding import Encoded
from jllm.data.sources.blocks import Block
from jllm.data.tokenizer import fast_json
from jllm.data.tokenizer.engine import CheckedEngine, EngineMismatchError, marks_first_piece
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.data.tokenizer.lengths import unchanged
from jllm.errors import UserError


def _bytes_of(token: str) -> int:
    """The bytes of text that a token of a tokenizer without byte-level letters stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())


class TokenLengths:
    """How many bytes of text each token stands for, from the vocabulary of the serialised backend."""

    def __init__(self, facts: TokenizerFacts) -> None:
        value: dict[str, Any] = fast_json.loads(facts.backend) if facts.backend else {"model": {"vocab": {}}}
        vocabulary = value["model"].get("vocab", {})
        if not isinstance(vocabulary, dict):  # Unigram: a list of pairs
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        outside = {key: part for key, part in value.items() if key not in ("model", "added_tokens")}
        byte_level = "ByteLevel" in json.dumps(outside)
        self.lengths = np.zeros(max([facts.vocab_size, *(index + 1 for index in vocabulary.values())]), dtype=np.int32)
        sizes = map(len if byte_level else _bytes_of, vocabulary)
        self.lengths[list(vocabulary.values())] = list(sizes)
        self._unchanged = unchanged(value)
        self.marks_words = not byte_level
        """Whether the tokenizer puts a "▁" before a text that does not start with one."""
        self.marks_first = marks_first_piece(facts.pre_tokenizer)
        """Whether it does so for the first piece of a conversation only."""

    def tokens_of_spans(
        self, engine: CheckedEngine, texts: Sequence[str], ids: Int32, offsets: Int64, spans: Int64
    ) -> NDArray[np.bool_]:
        """Which tokens overlap a span; `offsets` are those of the texts in `ids`."""
        chosen = np.zeros(len(ids) + 1, dtype=np.int32)
        if len(spans) == 0:
            return chosen[:-1].astype(bool)
        ends = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum(self.lengths.take(ids), out=ends[1:], dtype=np.int64)
        number, start, end = spans.T
        base, limit = ends[offsets[number]], ends[offsets[number + 1]]
        unique = number[np.flatnonzero(np.diff(number, prepend=-1))]  # spans are in the order of their texts
        found = [texts[i] for i in unique.tolist()]
        is_ascii = [text.isascii() for text in found]
        size = np.array(
            [len(text) if alone else len(text.encode()) for text, alone in zip(found, is_ascii, strict=True)]
        )
        extra = (ends[offsets[unique + 1]] - ends[offsets[unique]]) - size
        allowed = np.zeros(len(unique), dtype=np.int64)
        if self.marks_words:
            allowed = np.array([not text.startswith((" ", "▁")) for text in found], dtype=np.int64)
        plain = np.zeros(len(found), dtype=bool)
        if self._unchanged is not None:
            plain[:] = [alone or self._unchanged(text) for text, alone in zip(found, is_ascii, strict=True)]
        fits = plain & ((extra == 0) | (extra == allowed))
        where = np.searchsorted(unique, number)
        shift = extra[where]
        good = fits[where]
        # The mark in front belongs to the first byte of the text.
        first = np.searchsorted(ends[1:], base + np.where(start > 0, start + shift, 0), side="right")
        last = np.searchsorted(ends[:-1], np.minimum(base + end + shift, limit), side="left")
        np.add.at(chosen, first[good], 1)
        np.add.at(chosen, last[good], -1)
        mask = np.cumsum(chosen[:-1]) > 0
        for index in np.flatnonzero(~good).tolist():
            i = int(number[index])
            low = int(offsets[i])
            for begin, stop in engine.tokens_of_bytes(texts[i], int(start[index]), int(end[index])):
                mask[low + begin : low + stop] = True
        return mask


def _first_marked(rendered: Rendered) -> Rendered:
    """A space before each text that opens a conversation: the tokenizer turns it into the mark that belongs there."""
    is_text = rendered.sequence < 0
    opens = rendered.offsets[:-1][np.diff(rendered.offsets) > 0]
    numbers = np.cumsum(is_text) - 1
    texts, spans = list(rendered.texts), rendered.spans.copy()
    for number in numbers[opens[is_text[opens]]].tolist():
        if not texts[number].startswith((" ", "▁")):
            texts[number] = f" {texts[number]}"
            spans[spans[:, 0] == number, 1:] += 1
    return dataclasses.replace(rendered, texts=texts, spans=spans)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembler:
    """Encodes the texts of rendered conversations and puts the ids together."""

    engine: CheckedEngine
    lengths: TokenLengths

    def assemble(self, rendered: Rendered, *, block: int = 0) -> tuple[Documents, int]:
        """The conversations, and the number of checks made.

        Args:
            block: number of their block in its source.

        Raises:
            EngineMismatchError: a whole conversation, encoded by the reference in one go, has other ids.
        """
        engine, lengths = self.engine, self.lengths
        if lengths.marks_first:
            rendered = _first_marked(rendered)
        ids, offsets = engine.encode(rendered.texts)
        mask = lengths.tokens_of_spans(engine, rendered.texts, ids, offsets, rendered.spans)
        is_text = rendered.sequence < 0
        sizes = np.ones(len(rendered.sequence), dtype=np.int64)
        sizes[is_text] = np.diff(offsets)
        starts = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=starts[1:])
        result = np.empty(starts[-1], dtype=np.int32)
        trained = np.empty(starts[-1], dtype=bool)
        from_text = np.repeat(is_text, sizes)
        result[from_text], trained[from_text] = ids, mask
        result[starts[:-1][~is_text]] = rendered.sequence[~is_text]
        trained[starts[:-1][~is_text]] = rendered.trained[~is_text]
        documents = Documents(
            ids=result,
            offsets=starts[rendered.offsets],
            labels=np.where(trained, result, np.int32(IGNORE_INDEX)),
        )
        checks = 0
        if rendered.sample is not None:
            number, text = rendered.sample
            wanted = engine.reference_ids(text, block=block)
            if wanted is not None:
                checks = 1
                given = result[documents.offsets[number] : documents.offsets[number + 1]]
                if not np.array_equal(given, wanted) and engine.name == "hf":
                    raise UserError(
                        f"this tokenizer encodes a conversation differently in pieces than as a whole ({text[:40]!r});"
                        " use another tokenizer, or another --chat_template"
                    )
                if not np.array_equal(given, wanted):
                    raise EngineMismatchError(
                        f"{engine.name} {engine.version} differs on the conversation {text[:40]!r}"
                    )
        return documents, checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Chat records to conversations of ids: the encoder of `-t ft`.

    Attributes:
        assembler: waits for the engine, opened for chat, so that it treats every added token in a text as ordinary.
        forms: format of each source, by its index.
        fields: role → field, for the format `fields`.
        pool: worker processes (or threads) that render, or None to render in the calling thread.
        longest, refuse_longer: drop conversations of more tokens, or refuse them; None keeps all.
    """

    assembler: Callable[[], Assembler]
    plan: RenderPlan
    forms: tuple[str, ...]
    fields: dict[str, str]
    pool: Executor | None = None
    longest: int | None = None
    refuse_longer: bool = False

    def begin(self, block: Block, kind: str) -> Future[Rendered] | None:
        """Begin to render a block in a worker process; None where there is none."""
        if self.pool is None:
            return None
        return self.pool.submit(render_block, *self._work(block, kind))

    def _work(self, block: Block, kind: str) -> tuple[Any, ...]:
        return block, kind, self.forms[block.source], self.fields, self.plan

    def __call__(self, block: Block, kind: str, begun: Future[Rendered] | None = None) -> Encoded:
        rendered = render_block(*self._work(block, kind)) if begun is None else begun.result()
        documents, checks = self.assembler().assemble(rendered, block=block.index)
        counts = {"records": rendered.records, "checks": checks}
        if self.longest is not None and len(documents):
            over = documents.lengths > self.longest
            if over.any() and self.refuse_longer:
                first = int(np.argmax(over))
                raise UserError(
                    f"--overlong error: the conversation at line {rendered.lines[first]} has"
                    f" {int(documents.lengths[first])} tokens; raise --max_len, or use --overlong split or drop"
                )
            counts["overlong"] = int(over.sum())
            documents = documents.take(np.flatnonzero(~over))
        return Encoded(documents=documents, bad=rendered.bad, counts=counts, end=block.end, end_line=block.end_line)
