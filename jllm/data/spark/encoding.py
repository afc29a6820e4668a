"""The work of a raw2ids task: records of its partition to rows, by the encoders and packers of the local command.

Cost: the tokenizer's facts are sent to each executor once, an engine is built in each Python worker once.
"""

import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.formats import SAMPLE, commonest_format
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.columns import Int64
from jllm.data.packing.documents import Documents
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.control_classes import with_classes
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.restart import Attempt
from jllm.data.sources import json_lines
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import Source
from jllm.data.sources.parsing import parse_chunk
from jllm.data.sources.records import LARGEST_RECORD, RefusedRecordError, too_large
from jllm.data.spark.files import bare
from jllm.data.spark.findings import Findings, Place
from jllm.data.spark.sources import FILE, LINES, NUMBER, START, VALUE, WHOLE
from jllm.data.spark.worker_errors import WorkerErrors
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.engines import use_cores
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError

FORMAT_SCHEMA = "source int, format string, mistake string"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GivenSources:
    """The sources of a job as its tasks know them.

    Attributes:
        sources: all of them.
        numbers: of each by its bare path; empty where Spark names no files.
        reading: how the task's group is read.
        largest_record: bytes of the largest record.
    """

    sources: tuple[Source, ...]
    numbers: Mapping[str, int]
    reading: str
    largest_record: int = LARGEST_RECORD

    def number_of(self, path: str) -> int:
        """The number of a source by the path that Spark gives."""
        if not self.numbers:
            return 0
        return self.numbers[bare(path if self.reading == WHOLE else unquote(path))]

    def chunks(self, batch: pa.RecordBatch) -> Iterator["Part"]:
        """The records of a batch, those of one source at a time."""
        files = batch.column(FILE).dictionary_encode()
        of_row = np.array([self.number_of(path) for path in files.dictionary.to_pylist()])[files.indices.to_numpy()]
        if self.reading == WHOLE:
            for row, number in enumerate(of_row.tolist()):
                yield from self._chunks_of_file(number, batch.column(VALUE)[row].as_buffer())
            return
        starts, numbers = batch.column(START).to_numpy(), batch.column(NUMBER).to_numpy()
        ends = np.flatnonzero(np.diff(of_row)) + 1
        for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), batch.num_rows], strict=True):
            if begin < end:
                rows = batch.slice(begin, end - begin)
                yield self._part(int(of_row[begin]), rows, starts[begin:end], numbers[begin:end])

    def _part(self, source: int, rows: pa.RecordBatch, starts: Int64, numbers: Int64) -> "Part":
        kind, data = "parquet", pa.Table.from_batches([rows]).drop_columns([FILE, START, NUMBER])
        if self.reading == LINES:
            kind, lines = "jsonl", rows.column(VALUE).to_pylist()
            data = b"\n".join(lines)
        count = len(numbers)
        chunk = Chunk(source=source, index=0, line=0, data=data, end=count, end_line=count)
        return Part(chunk=chunk, kind=kind, starts=starts, numbers=numbers)

    def _chunks_of_file(self, number: int, content: Any) -> Iterator["Part"]:
        """The chunks of a whole file, as the local command cuts it."""
        source = self.sources[number]
        with tempfile.TemporaryDirectory(prefix="jllm-") as folder:
            path = Path(folder, "whole")
            path.write_bytes(content)
            here = dataclasses.replace(source, path=str(path), size=len(content))
            try:
                for chunk in read_chunks(here, number, most=self.largest_record):
                    yield Part(chunk=chunk, kind=source.kind, starts=None, numbers=None)
            except UserError as error:
                raise UserError(str(error).replace(str(path), source.path)) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Records of one source.

    Attributes:
        chunk: the records; the lines of its records are indices of `starts` and `numbers`, where there are some.
        kind: of the source.
        starts, numbers: of each record; None where lines are those of the file.
    """

    chunk: Chunk
    kind: str
    starts: Int64 | None
    numbers: Int64 | None

    def as_chunk(self, index: int) -> "Part":
        """The same as chunk `index` of a task, by which the engine is checked."""
        return dataclasses.replace(self, chunk=dataclasses.replace(self.chunk, index=index))

    def place(self, line: int) -> Place:
        """Of the record at a line of the chunk."""
        if self.starts is None or self.numbers is None:
            return self.chunk.source, 0, line
        return self.chunk.source, int(self.starts[line]), int(self.numbers[line])

    def tell(self, findings: Findings) -> None:
        """Which records these are."""
        if self.starts is None or self.numbers is None:
            findings.saw(self.chunk.source, 0, 1, max(1, self.chunk.end_line))
            return
        for start in np.unique(self.starts).tolist():
            numbers = self.numbers[self.starts == start]
            findings.saw(self.chunk.source, start, int(numbers.min()), int(numbers.max()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodingJob:
    """What the tasks of a group of sources need. Travels to them once each.

    Attributes:
        config: the options.
        attempt: which fast paths are taken.
        facts: a broadcast of the tokenizer's facts, which are large.
        given: a broadcast of the sources.
        chat: how conversations are rendered, as `recipes.chat_encoder` takes it; empty for documents.
        findings: an accumulator: group and partition → what its task found.
        errors: those that the driver waits for.
    """

    config: Raw2IdsConfig
    attempt: Attempt
    facts: Any
    given: Any
    chat: dict[str, Any]
    findings: Any
    errors: WorkerErrors

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Records of one partition to rows."""
        with self.errors.carried():
            yield from self._rows(batches)

    def _rows(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        config, facts = self.config, self.facts.value
        findings = Findings()
        encoder, prefix, findings.engine = _opened_encoder(config, self.attempt, facts, self.chat)
        packer = recipes.packer_of(config, facts, prefix)
        given: GivenSources = self.given.value
        encoder = with_classes(config.control_class, given.sources, encoder)
        parts = (part for batch in batches for part in given.chunks(batch))
        for index, part in enumerate(parts):
            documents = _encoded(encoder, part.as_chunk(index), findings, given.largest_record)
            rows = packer.feed(documents) if documents is not None else None
            if rows is not None:
                yield rows
        yield from packer.finish()
        context = TaskContext.get()
        assert context is not None
        self.findings.add({(self.given.value.reading, context.partitionId()): findings})


def _encoded(encoder: ChunkEncoder, part: Part, findings: Findings, most: int) -> Documents | None:
    part.tell(findings)
    data = part.chunk.data
    try:
        lines = data if part.starts is not None and isinstance(data, bytes) else b""
        if len(lines) > most and (line := json_lines.record_beyond(lines, most)) is not None:
            raise too_large(most, line)
        encoded: Encoded = encoder(part.chunk, part.kind)
    except RefusedRecordError as error:
        findings.found_refused(part.place(error.line), error)
        return None
    findings.count(encoded.counts, encoded.documents.lengths)
    findings.found_bad((part.place(each.line), each.kind, each.detail) for each in encoded.bad)
    return encoded.documents


Opened = tuple[ChunkEncoder, tuple[int, ...], dict[str, Any]]
"""An encoder, the ids at the start of every row, and what the manifest says of the engine."""
_opened: dict[str, Opened] = {}


def _opened_encoder(config: Raw2IdsConfig, attempt: Attempt, facts: TokenizerFacts, chat: dict[str, Any]) -> Opened:
    """The encoder of this Python worker, which several tasks use one after the other."""
    key = f"{facts.sha256} {config} {attempt} {chat}"
    if key not in _opened:
        use_cores(1)  # Spark runs a worker on every core
        engine = open_engine(facts, attempt.engine, inert=config.is_chat, trust_remote_code=config.trust_remote_code)
        prefix = recipes.sequence_prefix(config, engine, facts)
        encoder: ChunkEncoder
        if config.type == "pretrain":
            encoder = recipes.pretrain_encoder(config, facts, engine)
        else:
            assembler = Assembler(engine=engine, lengths=TokenLengths(facts))
            encoder = recipes.chat_encoder(config, assembler, **chat)
        _opened.clear()
        _opened[key] = encoder, prefix, attempt.record_of(engine)
    return _opened[key]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormatJob:
    """Which chat format the first records of each source look like."""

    given: Any
    errors: WorkerErrors

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Records of one partition to rows of `FORMAT_SCHEMA`, for sources that begin in it."""
        first: dict[int, list[Any]] = {}
        names: dict[int, str] = {}
        with self.errors.carried():
            for batch in batches:
                for part in self.given.value.chunks(batch):
                    number = part.chunk.source
                    names[number] = self.given.value.sources[number].name
                    known = first.setdefault(number, [])
                    if len(known) < SAMPLE and (part.starts is None or not part.starts.any()):
                        known += parse_chunk(part.chunk, part.kind).values
        for number, records in first.items():
            found = {"source": number, "format": "", "mistake": ""}
            try:
                found["format"] = commonest_format(records, f"-i {names[number]}")
            except UserError as error:
                found["mistake"] = str(error)
            yield pa.RecordBatch.from_pylist([found], schema=_FORMATS)


_FORMATS = pa.schema([("source", pa.int32()), ("format", pa.string()), ("mistake", pa.string())])
