"""One chunk of chat records to text that is ready to be encoded."""

import array
import collections
import dataclasses
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.data.chat.formats import PAIRS, read_conversation
from jllm.data.chat.records.conversation import MORE, BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.pairs import read_pair
from jllm.data.chat.rendering import RenderPlan
from jllm.data.chat.segments import FlatSegments
from jllm.data.chat.short_cut import ConversationRenderer
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import BadRecord

_CHECK_CHARACTERS = 8192
_MOST_NOTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """The conversations of a chunk, ready to be encoded.

    Attributes:
        texts: all segments of text.
        sequence: a control token's id, or -1 for the next text.
        trained: for each entry of `sequence`, whether that control token is trained on.
        offsets: conversation i is `sequence[offsets[i]:offsets[i+1]]`.
        spans: what of the texts is trained on: number of the text, first byte, end byte.
        lines: where each conversation was found.
        bad: records that could not be rendered.
        sample: number of a conversation and its whole text, to check the engine with.
        notes: what was left out of conversations, by name, and how often.
    """

    texts: list[str]
    sequence: NDArray[np.int32]
    trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    spans: NDArray[np.int64]
    lines: list[int]
    bad: list[BadRecord]
    records: int
    sample: tuple[int, str] | None
    notes: dict[str, int] = dataclasses.field(default_factory=dict)


def renderer_of(plan: RenderPlan) -> ConversationRenderer:
    """The renderer of a plan, one for each thread: compiling a template takes longer than rendering a chunk."""
    if getattr(_local, "plan", None) != plan:
        _local.plan, _local.renderer = plan, ConversationRenderer(plan)
    renderer: ConversationRenderer = _local.renderer
    return renderer


_local = threading.local()


def render_chunk(chunk: Chunk, kind: str, format_name: str, fields: dict[str, str], plan: RenderPlan) -> Rendered:
    """Parse and render the records of a chunk."""
    renderer = renderer_of(plan)
    renderer.begin_chunk()
    style = renderer.style
    records = parse_chunk(chunk, kind)
    texts, sequence, trained, spans = FlatSegments([], array.array("i"), bytearray(), [])
    offsets = [0]
    lines: list[int] = []
    bad = list(records.bad)
    sample: tuple[int, str] | None = None
    notes: collections.Counter[str] = collections.Counter()
    for record, line in zip(records.values, records.lines, strict=True):
        try:
            conversations = _conversations_of(record, format_name, fields, style)
            rendered = [renderer.flat(each) for each in conversations]
            if not all(found.spans or any(found.trained) for found, _ in rendered):
                raise BadRecordError("no answer", "nothing in it is trained on")
            if len(rendered) == 2 and rendered[0][0] == rendered[1][0]:
                raise BadRecordError("identical pair", "the template makes the same text of both answers")
        except BadRecordError as error:
            bad.append(BadRecord(kind=error.kind, line=line, detail=error.detail))
            continue
        for conversation, (found, whole) in zip(conversations, rendered, strict=True):
            if sample is None and whole is not None and len(whole) <= _CHECK_CHARACTERS:
                sample = (len(offsets) - 1, whole)
            for name, times in conversation.notes.items() if conversation.notes else ():
                notes[name if name in notes or len(notes) < _MOST_NOTES else MORE] += times
            before = len(texts)
            texts += found.texts
            sequence.extend(found.controls)
            trained += found.trained
            spans += [(before + number, start, end) for number, start, end in found.spans]
            offsets.append(len(sequence))
            lines.append(line)
    bad.sort(key=lambda item: item.line)
    return Rendered(
        texts=texts,
        sequence=np.frombuffer(sequence, dtype=np.int32),
        trained=np.frombuffer(trained, dtype=bool),
        offsets=np.array(offsets, dtype=np.int64),
        spans=np.array(spans, dtype=np.int64).reshape(-1, 3),
        lines=lines,
        bad=bad,
        records=len(records.values) + len(records.bad),
        sample=sample,
        notes=dict(notes),
    )


def _conversations_of(
    record: Any, format_name: str, fields: dict[str, str], style: ReadingStyle
) -> tuple[Conversation, ...]:
    """What a record is rendered to: one conversation, or of a preference pair the chosen and the rejected one."""
    if format_name == PAIRS:
        return read_pair(record, fields, style)
    return (read_conversation(record, format_name, fields, style),)
