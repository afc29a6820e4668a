"""Input that holds token ids already: Parquet files with `input_ids`, and `labels` where not all is trained on.

Rows are documents whose ids nobody touches: nothing is put around them, and they are not cut. Padding, which is where
an `attention_mask` is 0, is left out. Columns that mark with 1 what is trained on (`completion_mask`, `loss_weights`, a
row's `train`, ...) become labels, together with those that are there; a column that may mean the contrary is refused.
A row longer than `--max_len` is a bad record, dropped and counted, but for `--stack`, which has no long documents. Ids
beyond the vocabulary are refused: they were made with another tokenizer.

Cost: numpy over whole chunks, no Python object for a token or a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from jllm.data.dataset.columns import CU_SEQLENS, IGNORE_INDEX, INPUT_IDS, LABELS, Int64, from_list_array, to_list_array
from jllm.data.dataset.foreign import check_type, list_column
from jllm.data.dataset.further import is_list
from jllm.data.dataset.training_marks import ATTENTION_MASK, marks_trained, says_what_is_trained
from jllm.data.packing.documents import Documents
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.inputs import Source
from jllm.data.sources.parquet import open_parquet, refuse_columns
from jllm.data.sources.records import BadRecord
from jllm.data.tokenizer.facts import TokenizerFacts
from jllm.errors import UserError

KIND = "ids"
READ = (INPUT_IDS, LABELS, ATTENTION_MASK)
"""The columns that are read of such a source, beside those that mark what is trained on."""
_NO_FLAG = 2
"""Stands for what is neither 0 nor 1 in a column of marks."""
CHAT_COLUMNS = ("messages", "conversations", "conversation", "instruction", "prompt", "question", "chosen")
"""What a table of chat records has, one of them at least."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Input:
    """The sources of a run, those of token ids named `KIND`.

    Attributes:
        marks: of each source, the columns that mark what is trained on.
        labels: some of these have labels, or marks that become labels.
        chat: there are sources of conversations.
    """

    sources: list[Source]
    marks: tuple[tuple[str, ...], ...]
    labels: bool
    chat: bool

    @property
    def some(self) -> bool:
        """Whether any source holds ids."""
        return any(source.kind == KIND for source in self.sources)

    @property
    def all(self) -> bool:
        return all(source.kind == KIND for source in self.sources)

    def columns(self, number: int) -> tuple[str, ...]:
        """The columns to read of source `number`, which holds ids."""
        return (*READ, *self.marks[number])


def recognised(config: Raw2IdsConfig, sources: list[Source]) -> Input:
    """Find the Parquet files that hold ids, and nothing that the options ask to be made into ids.

    Raises:
        UserError: their columns are not what they must be, or the options make no sense for them.
    """
    if config.type == "pretrain":
        made_of: Sequence[str] = (config.text_field.split(".")[0],)
    else:
        made_of = () if config.field_map or config.format != "auto" else CHAT_COLUMNS
    found, marks, labels = [], [], False
    for source in sources:
        marked: tuple[str, ...] = ()
        if source.kind in ("parquet", KIND) and (made_of or source.kind == KIND):
            schema = open_parquet(source).schema_arrow
            if config.type == "preference" and INPUT_IDS in schema.names:
                raise UserError(
                    f"-i {source.name}: has {INPUT_IDS}; -t preference reads texts and messages; give these"
                )
            if source.kind == KIND or (INPUT_IDS in schema.names and not set(made_of) & set(schema.names)):
                marked = _check_columns(schema, source)
                source = dataclasses.replace(source, kind=KIND)
                labels = labels or LABELS in schema.names or bool(marked)
            elif config.type == "pretrain" and not set(made_of) & set(schema.names):
                refuse_columns(source, made_of, schema.names)
        found.append(source)
        marks.append(marked)
    chat = config.is_chat and any(source.kind != KIND for source in found)
    given = Input(sources=found, marks=tuple(marks), labels=labels, chat=chat)
    if given.some and (config.doc_prefix is not None or config.doc_suffix is not None):
        option = "doc_prefix" if config.doc_prefix is not None else "doc_suffix"
        raise UserError(f"--{option}: the input has {INPUT_IDS}, around which nothing is put; leave the option out")
    return given


def _check_columns(schema: pa.Schema, source: Source) -> tuple[str, ...]:
    """The columns that mark what is trained on, after all that are read were found to be what they must be."""
    where = f"-i {source.name}"
    if INPUT_IDS not in schema.names:
        raise UserError(f"{where}: no column {INPUT_IDS} (columns: {', '.join(schema.names[:12])})")
    if CU_SEQLENS in schema.names:
        raise UserError(
            f"{where}: has {CU_SEQLENS}: its rows are packed already; the folder is a data set as it is (jllm manifest"
            " FOLDER describes it)"
        )
    for name in READ:
        if name in schema.names:
            check_type(schema.field(name), where)
    marks = []
    for field in schema:
        if field.name in READ or not says_what_is_trained(field):
            continue
        if not marks_trained(field):
            raise UserError(
                f"{where}: column {field.name} says what is trained on, and not whether 1 means yes or no; write"
                f" {LABELS} instead (the id, or {IGNORE_INDEX}), or leave the column out"
            )
        if schema.names.count(field.name) > 1:
            raise UserError(f"{where}: several columns are called {field.name}; leave one")
        marks.append(field.name)
    return tuple(marks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdsEncoder:
    """Rows of ids to documents, beside the encoder of the other sources.

    Attributes:
        facts: of the tokenizer that made the ids.
        names: of the sources, by their index.
        longest: longer rows are dropped; None keeps all.
        refuse_longer: they are a mistake instead.
        labels: give labels, also where a source has none.
        masked_ids: ids that are not trained on wherever they are.
        others: encodes what holds no ids; None where all sources do.
    """

    facts: TokenizerFacts
    names: tuple[str, ...]
    longest: int | None
    refuse_longer: bool
    labels: bool
    masked_ids: frozenset[int]
    others: ChunkEncoder | None

    def __call__(self, chunk: Chunk, kind: str) -> Encoded:
        if kind != KIND:
            assert self.others is not None
            return self.others(chunk, kind)
        documents, bad = self._documents(chunk.data, chunk.line, f"-i {self.names[chunk.source]}")
        return Encoded(
            documents=documents,
            bad=bad,
            counts={"records": chunk.data.num_rows},
            end=chunk.end,
            end_line=chunk.end_line,
        )

    def _documents(self, table: pa.Table, line: int, where: str) -> tuple[Documents, list[BadRecord]]:
        """The good rows of a table that begins at row `line` of its source, and what is wrong with the others."""
        bad: dict[int, BadRecord] = {}

        def refuse(wrong: NDArray[np.bool_], numbers: Int64, kind: str, detail: str) -> Int64:
            for number in numbers[wrong].tolist():
                bad[number] = BadRecord(kind=kind, line=line + number, detail=detail)
            return np.flatnonzero(~wrong)

        numbers = np.arange(table.num_rows, dtype=np.int64)
        for name in table.column_names:
            kept = refuse(table.column(name).is_null().to_numpy(), numbers, "missing field", f"{name} is null")
            table, numbers = (table, numbers) if len(kept) == len(numbers) else (table.take(kept), numbers[kept])
        marks = [name for name in table.column_names if name not in READ]
        columns = {
            name: Documents(ids=values, offsets=offsets)
            for name in (INPUT_IDS, *(name for name in table.column_names if name != INPUT_IDS))
            for values, offsets in [
                from_list_array(
                    list_column(table.column(name), where)
                    if name in READ
                    else _flags(table.column(name), table.column(INPUT_IDS), f"{where}: column {name}")
                )
            ]
        }
        self._check_range(columns[INPUT_IDS], line + numbers, where)
        for name in [name for name in columns if name != INPUT_IDS]:
            differ = columns[name].lengths != columns[INPUT_IDS].lengths
            kept = refuse(differ, numbers, f"wrong {name}", f"not as many as {INPUT_IDS}")
            columns, numbers = {name: column.take(kept) for name, column in columns.items()}, numbers[kept]
        if ATTENTION_MASK in columns:
            columns = _without_padding(columns)
        for name in marks:
            kept = refuse(
                _rows_with(columns[name], columns[name].ids == _NO_FLAG), numbers, f"wrong {name}", "not 0 or 1"
            )
            columns, numbers = {name: column.take(kept) for name, column in columns.items()}, numbers[kept]
        documents = columns[INPUT_IDS]
        if LABELS in columns:
            differ = (columns[LABELS].ids != documents.ids) & (columns[LABELS].ids != IGNORE_INDEX)
            detail = f"neither the id nor {IGNORE_INDEX}; labels are not shifted"
            kept = refuse(_rows_with(documents, differ), numbers, "wrong labels", detail)
            columns, numbers = {name: column.take(kept) for name, column in columns.items()}, numbers[kept]
        documents = columns[INPUT_IDS]
        if LABELS in columns or marks:
            labels = columns[LABELS if LABELS in columns else INPUT_IDS].ids
            for name in marks:
                labels = np.where(columns[name].ids == 1, labels, IGNORE_INDEX)
            documents = dataclasses.replace(documents, labels=labels)
        elif self.labels:
            documents = dataclasses.replace(documents, labels=documents.ids)
        kept = refuse(documents.lengths == 0, numbers, "empty document", "no ids")
        documents, numbers = documents.take(kept), numbers[kept]
        if self.longest is not None:
            over = documents.lengths > self.longest
            if over.any() and self.refuse_longer:
                first = int(np.argmax(over))
                place, length = line + int(numbers[first]), int(documents.lengths[first])
                raise UserError(f"--overlong error: row {place} of {where[3:]} has {length} ids; raise --max_len")
            kept = refuse(over, numbers, "too long", f"more than {self.longest} ids")
            documents = documents.take(kept)
        if self.masked_ids and documents.labels is not None:
            masked = np.isin(documents.ids, np.array(sorted(self.masked_ids), dtype=np.int32))
            documents = dataclasses.replace(documents, labels=np.where(masked, IGNORE_INDEX, documents.labels))
        return documents, [bad[number] for number in sorted(bad)]

    def _check_range(self, rows: Documents, lines: Int64, where: str) -> None:
        """Raises:
        UserError: an id is not one of the tokenizer's.
        """
        wrong = (rows.ids < 0) | (rows.ids >= self.facts.vocab_size)
        if wrong.any():
            first = int(np.argmax(wrong))
            row = int(lines[np.searchsorted(rows.offsets, first, side="right") - 1])
            raise UserError(
                f"{where}: row {row} has the id {int(rows.ids[first])}, and {self.facts.name} has the ids 0 to"
                f" {self.facts.vocab_size - 1}; give the tokenizer that made the ids"
            )


def _rows_with(documents: Documents, places: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[D] whether each document has such a place."""
    found = np.zeros(len(documents.lengths), dtype=bool)
    found[np.repeat(np.arange(len(found)), documents.lengths)[places]] = True
    return found


def _flags(column: pa.ChunkedArray, ids: pa.ChunkedArray, where: str) -> pa.ListArray:
    """A column of marks as lists of 0, 1 and `_NO_FLAG`; one mark a row counts for all its ids.

    Raises:
        UserError: a list has a null.
    """
    array = column.combine_chunks()
    if is_list(array.type):
        elements, lengths = array.flatten(), array.value_lengths()
    else:
        elements, lengths = array, ids.combine_chunks().value_lengths()
    if elements.null_count:
        raise UserError(f"{where}: {elements.null_count} elements are null; remove those rows")
    numbers = elements.cast(pa.float64()).to_numpy(zero_copy_only=False)
    marks = np.where(np.isin(numbers, (0, 1)), numbers, _NO_FLAG).astype(np.int32)
    sizes = lengths.to_numpy(zero_copy_only=False).astype(np.int64)
    if not is_list(array.type):
        marks = np.repeat(marks, sizes)
    return to_list_array(marks, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


def _without_padding(columns: dict[str, Documents]) -> dict[str, Documents]:
    """The columns without the places where the attention mask is 0."""
    mask = columns[ATTENTION_MASK]
    real = mask.ids != 0
    if real.all():
        return columns
    offsets = np.concatenate([[0], np.cumsum(real)])[mask.offsets]
    return {name: Documents(ids=column.ids[real], offsets=offsets) for name, column in columns.items()}


def ids_encoder(config: Raw2IdsConfig, facts: TokenizerFacts, given: Input, others: ChunkEncoder | None) -> IdsEncoder:
    """The encoder of sources of which some hold ids; `others` encodes the rest."""
    return IdsEncoder(
        facts=facts,
        names=tuple(source.name for source in given.sources),
        longest=None if config.stack else config.max_len,
        refuse_longer=config.is_chat and config.overlong_way == "error",
        labels=config.is_chat or config.mask_tokens or given.labels,
        masked_ids=facts.special_ids if config.mask_tokens else frozenset(),
        others=others,
    )
