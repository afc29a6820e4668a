"""Chunks of records to documents of token ids: what runs on every core.

An encoder is the work for one chunk: parse, encode, end each document. It has no state and touches no file, so it runs
in worker processes here and inside Spark executors elsewhere.

* `PretrainEncoder`: texts, each a document.
* `ChatEncoder`: conversations, or preference pairs of them, rendered, and encoded in one call for all text of a chunk.
* `pretokenized.IdsEncoder`: rows that hold ids already.

Cost: dominated by the engine, or by rendering; the rest is numpy over whole chunks.
"""

import contextlib
import dataclasses
from typing import Protocol

import numpy as np

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.rendered import render_chunk
from jllm.data.chat.rendering import RenderPlan
from jllm.data.dataset.columns import IGNORE_INDEX, Int32
from jllm.data.dataset.token_counts import length_bucket
from jllm.data.packing.documents import Documents, with_affixes
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.long_texts import BrokenTextError, LongText
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import BadRecord, RefusedRecordError, texts_of
from jllm.data.tokenizer.checked_engine import CheckedEngine
from jllm.data.tokenizer.document_end import document_end
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoded:
    """The result of one chunk.

    Attributes:
        documents: its good records in order.
        bad: its bad records in order.
        counts: what happened to the records, by name (`records`, `checks`, ...): sums over chunks are meaningful.
        end, end_line: where the next chunk starts.
    """

    documents: Documents
    bad: list[BadRecord]
    counts: dict[str, int]
    end: int
    end_line: int


class ChunkEncoder(Protocol):
    """The work for one chunk."""

    def __call__(self, chunk: Chunk, kind: str) -> Encoded:
        """The documents of a chunk of a source of this kind."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainEncoder:
    """Text records to documents.

    Attributes:
        engine: what encodes.
        prefix, suffix: ids around every document; `suffix` ends with end-of-text.
        field: where the text is in a JSON record, with dots.
        parse_special: special tokens in the text become their ids.
        masked_ids: ids that are not trained on wherever they are.
    """

    engine: CheckedEngine
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    field: str = "text"
    parse_special: bool = False
    masked_ids: frozenset[int] = frozenset()

    def __call__(self, chunk: Chunk, kind: str) -> Encoded:
        with contextlib.suppress(BrokenTextError):  # of a long text, which is then bad as short ones are
            return self._encoded(chunk, kind, self.field)
        return self._encoded(chunk, kind, None)

    def _encoded(self, chunk: Chunk, kind: str, long_field: str | None) -> Encoded:
        records = texts_of(parse_chunk(chunk, kind, long_field=long_field), kind, self.field)
        checks = self.engine.check(records.values, parse_special=self.parse_special, chunk=chunk.index)
        counts = {"records": len(records.values) + len(records.bad), "checks": checks}
        documents = self.documents(records.values)
        return Encoded(documents=documents, bad=records.bad, counts=counts, end=chunk.end, end_line=chunk.end_line)

    def documents(self, texts: list[str] | list[str | LongText]) -> Documents:
        """Texts to documents: ids with the prefix and suffix, and labels where some ids are masked. The list is empty
        then: a text may be as large as all else here."""
        ids, offsets = self.engine.encode(texts, parse_special=self.parse_special)
        texts.clear()
        ids, offsets = with_affixes(ids, offsets, _ids(self.prefix), _ids(self.suffix))
        labels = None
        if self.masked_ids:
            labels = np.where(np.isin(ids, _ids(tuple(self.masked_ids))), np.int32(IGNORE_INDEX), ids)
        return Documents(ids=ids, offsets=offsets, labels=labels)


def _ids(values: tuple[int, ...]) -> Int32:
    return np.array(values, dtype=np.int32)


def pretrain_affixes(facts: TokenizerFacts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What goes around a document: the tokenizer's own prefix, and the token that ends documents.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    end = document_end(facts)
    if end is None:
        raise UserError(
            f"--tokenizer {facts.name}: it has no end-of-text token to end documents with; set eos_token in its"
            " tokenizer_config.json, or give --doc_suffix"
        )
    own = facts.suffix if facts.suffix[-1:] not in ((facts.eos_id,), (end,)) else facts.suffix[:-1]
    return facts.prefix, (*own, end)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatEncoder:
    """Chat records to conversations of ids: the encoder of `-t ft`.

    Attributes:
        assembler: with the engine, opened for chat, so that it treats every added token in a text as ordinary.
        formats: of the records of each source, by its index.
        fields: role → field, for the format `fields`.
        longest, refuse_longer: drop conversations of more tokens, or refuse them; None keeps all.
        names: of the sources, by their index, for messages.
        pairs: the records are preference pairs, each of which becomes one document with a cut.
    """

    assembler: Assembler
    plan: RenderPlan
    formats: tuple[str, ...]
    fields: dict[str, str]
    longest: int | None = None
    refuse_longer: bool = False
    names: tuple[str, ...] = ()
    pairs: bool = False

    def __call__(self, chunk: Chunk, kind: str) -> Encoded:
        rendered = render_chunk(chunk, kind, self.formats[chunk.source], self.fields, self.plan)
        documents, checks = self.assembler.assemble(rendered, chunk=chunk.index)
        counts = {"records": rendered.records, "checks": checks, **rendered.notes}
        what, lines, ways = "conversation", rendered.lines, "use --overlong split or drop"
        if self.pairs:
            counts |= lengths_of_sides(documents)
            documents = documents.in_pairs()
            what, lines, ways = "preference pair", lines[::2], "use --overlong drop"
        if self.longest is not None and len(documents):
            over = documents.lengths > self.longest
            if over.any() and self.refuse_longer:
                first = int(np.argmax(over))
                raise RefusedRecordError(
                    f"--overlong error: the {what} at",
                    lines[first],
                    f"has {int(documents.lengths[first])} tokens; raise --max_len, or {ways}",
                    name=self.names[chunk.source] if self.names else None,
                )
            counts["overlong"] = int(over.sum())
            documents = documents.take(np.flatnonzero(~over))
        return Encoded(documents=documents, bad=rendered.bad, counts=counts, end=chunk.end, end_line=chunk.end_line)


SIDES = ("chosen", "rejected")
LENGTHS = {side: f"{side} length " for side in SIDES}
"""Begins the names under which the lengths of each side of pairs are counted, the bucket behind it."""


def lengths_of_sides(documents: Documents) -> dict[str, int]:
    """How many conversations there are of each length, of chosen ones (even) and rejected ones (odd)."""
    found: dict[str, int] = {}
    for number, side in enumerate(SIDES):
        buckets, counts = np.unique(length_bucket(documents.lengths[number::2]), return_counts=True)
        found |= {f"{LENGTHS[side]}{bucket}": int(count) for bucket, count in zip(buckets, counts, strict=True)}
    return found
