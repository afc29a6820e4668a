"""One chunk of chat records to text that is ready to be encoded: what runs in worker processes.

A worker imports neither Arrow nor an engine, so that it starts fast and stays small (about 60 MB).
"""

import array
import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jllm.children import Sealed
from jllm.data.chat.formats import PAIRS, read_conversation
from jllm.data.chat.records.conversation import MORE, BadRecordError, Conversation, ReadingStyle
from jllm.data.chat.records.pairs import read_pair
from jllm.data.chat.rendering import RenderPlan
from jllm.data.chat.segments import FlatSegments
from jllm.data.chat.short_cut import ConversationRenderer
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import BadRecord
from jllm.machine import collect_rarely

_CHECK_CHARACTERS = 8192
_MOST_NOTES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rendered:
    """The conversations of a chunk, ready to be encoded; plain data, cheap to hand to another process.

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

    def __getstate__(self) -> dict[str, Any]:
        """On the way to another process the texts are one: pickling many small ones takes longer than all else here."""
        joined = "".join(self.texts)
        if not joined.isascii():  # slices of other texts are looked through for their widest letter
            return self.__dict__
        return {**self.__dict__, "texts": (joined, np.array([0, *itertools.accumulate(map(len, self.texts))]))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["texts"], tuple):
            joined, ends = state["texts"]
            cuts = ends.tolist()
            state = {**state, "texts": [joined[begin:end] for begin, end in itertools.pairwise(cuts)]}
        self.__dict__.update(state)


@contextlib.contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """Processes that render; they start at once, so that they are there when the first chunk comes. None for one."""
    if count == 1:
        yield None
        return
    spawn = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as ends:
        with Sealed():  # all of the pool's processes start here
            pool = ends.enter_context(ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin_worker))
            for _ in range(count):
                pool.submit(get_ready)  # a process is started when there is work for it
        try:
            yield pool
        finally:  # a run that has enough rows, or failed, needs nothing of what was begun ahead
            pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    collect_rarely()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A process that waits for work does not notice that nobody is left to give it some: a killed command would leave
    its workers behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def get_ready() -> None:
    """Import what rendering needs: this module, with what it imports, and Jinja."""
    import jinja2  # noqa: F401


def renderer_of(plan: RenderPlan) -> ConversationRenderer:
    """The renderer of a plan, one for each thread: compiling a template takes longer than rendering a chunk."""
    if getattr(_local, "plan", None) != plan:
        _local.plan, _local.renderer = plan, ConversationRenderer(plan)
    renderer: ConversationRenderer = _local.renderer
    return renderer


_local = threading.local()


def render_chunk(chunk: Chunk, kind: str, format_name: str, fields: dict[str, str], plan: RenderPlan) -> Rendered:
    """Parse and render the records of a chunk; the work of a worker process."""
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
