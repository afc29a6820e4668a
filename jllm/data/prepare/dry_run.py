"""`raw2ids --dry_run`: what a run would do, shown on the first records, with nothing written.

Guarantees: the records go through the code of the run itself. What is said of them is so; what is said of the whole
input is an estimate, and called one.
Cost: the tokenizer, and `RECORDS` records on one core.
"""

import collections
import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.shards import ShardWriter
from jllm.data.dataset.token_counts import count_trained
from jllm.data.packing.documents import Documents
from jllm.data.prepare import pretokenized, recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.control_classes import with_classes
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.outputs import NAMES_OF_OUR_FOLDERS
from jllm.data.prepare.reporting.totals import describe
from jllm.data.show import show_pairs, show_row
from jllm.data.sources.chunk import Chunk, first_records, size_of
from jllm.data.sources.chunks import read_chunks
from jllm.data.sources.inputs import Source, resolve
from jllm.data.sources.parquet import open_parquet
from jllm.data.sources.streams import expansion
from jllm.data.tokenizer.checked_engine import check_for_chat, open_engine
from jllm.data.tokenizer.decoding import make_decoder
from jllm.data.tokenizer.engines import use_cores
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.errors import UserError, printable, say
from jllm.machine import megabytes, usable_cores
from jllm.options import OF_THE_CALL, describe_differences, differences

RECORDS, ROWS, EXAMPLES = 1000, 3, 5


@dataclasses.dataclass(kw_only=True)
class _Sample:
    """The first records of the input, encoded; `size` of them as `size_of` counts, `whole` where there are no more."""

    encoded: list[tuple[Source, Encoded]] = dataclasses.field(default_factory=list)
    size: int = 0
    whole: bool = True

    @property
    def records(self) -> int:
        return sum(encoded.counts["records"] for _, encoded in self.encoded)


class _Told:
    """What is found: said in lines as it comes, or kept, and printed as one JSON object."""

    def __init__(self, config: Raw2IdsConfig) -> None:
        self._facts: dict[str, Any] | None = None
        if config.json:
            values = json.loads(json.dumps(dataclasses.asdict(config), default=str))
            options = {name: value for name, value in values.items() if name not in OF_THE_CALL}
            self._facts = {"options": options, "differs": {name: options[name] for name in differences(config)}}
        else:
            say("\n".join(describe_differences(config)))

    def tell(self, name: str, value: Any, *lines: str) -> None:
        """A fact for programs, and its lines for people."""
        if self._facts is not None:
            self._facts[name] = value
            return
        for line in lines:
            say(line)

    @property
    def is_json(self) -> bool:
        return self._facts is not None

    def end(self) -> None:
        """The last thing."""
        say("dry run: nothing was written" if self._facts is None else json.dumps(self._facts, indent=1), flush=True)


def dry_run(config: Raw2IdsConfig) -> None:
    """Print what differs from the defaults, the format found, template and special tokens, some rows, the share of bad
    records, and estimates; with `--json` all of it, and every option, as one JSON object.

    Raises:
        UserError: what a run would refuse before it reads more than the first records, or that none of them is good.
    """
    told = _Told(config)
    sources = resolve(config.input, kind=config.input_format, passed_over=NAMES_OF_OUR_FOLDERS)
    recipes.field_map(config)
    use_cores(usable_cores(config.cores))
    given = pretokenized.recognised(config, sources)
    formats = recipes.formats_of(config, given.sources) if given.chat else ()
    facts = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    encoder = with_classes(config.control_class, given.sources, _encoder(config, facts, given, formats, told))
    sample = _sample(config, given, encoder)
    documents = [encoded.documents for _, encoded in sample.encoded if len(encoded.documents)]
    bad = [(source.name, record) for source, encoded in sample.encoded for record in encoded.bad]
    count = sum(map(len, documents))
    examples = [describe(name, record) for name, record in bad[:EXAMPLES]]
    line = f"bad records: {len(bad):,} of the first {sample.records:,}"
    found = {"bad": len(bad), "records": sample.records, "examples": examples}
    told.tell("bad_records", found, line, *(f"  {example}" for example in examples))
    if not documents:
        raise UserError(f"-i {' '.join(config.input)}: none of the first {sample.records:,} records can be used")
    special = _special_tokens(facts, documents)
    shown = ", ".join(f"{printable(name)} x {n:,}" for name, n in special.items()) or "none"
    told.tell("special_tokens", special, f"special tokens: {shown}")
    if config.control_class:
        of_documents = np.concatenate([each.classes for each in documents if each.classes is not None])
        by_class = {name: int((of_documents == kind).sum()) for name, kind in (("+1", 1), ("-1", -1), ("0", 0))}
        told.tell(
            "control_classes", by_class, f"control classes: {', '.join(f'{k} x {n:,}' for k, n in by_class.items())}"
        )
    packer = recipes.packer_of(config, facts, labels=given.labels)
    fed = [packer.feed(each) for each in documents]
    batches = [batch for batch in (*fed, *packer.finish()) if batch is not None and batch.num_rows]
    rows = [row for batch in batches[:ROWS] for row in batch.slice(0, ROWS).to_pylist()][:ROWS]
    decode = make_decoder(config.tokenizer, facts.for_manifest)
    told.tell("rows", rows)
    for number, row in enumerate(() if told.is_json else rows):
        (show_pairs if config.type == "preference" else show_row)(number, row, decode, colored=False)
    tokens = sum(int(each.offsets[-1]) for each in documents)
    trained = sum(count_trained(batch) for batch in batches)
    made = sum(batch.num_rows for batch in batches)
    what = "pairs" if config.type == "preference" else "documents"
    line = f"{count:,} {what}, {tokens:,} tokens, {trained:,} trained in {made:,} rows"
    told.tell("sample", {"documents": count, "tokens": tokens, "trained": trained, "rows": made}, line)
    with (
        tempfile.TemporaryDirectory() as folder,
        ShardWriter(
            Path(folder, "sample.parquet"), columns=packer.columns, further=packer.further, codec=config.compress
        ) as writer,
    ):
        for batch in batches:
            writer.write(batch)
    told.tell("whole_input", *_estimate(given.sources, sample, tokens, writer.statistics.bytes))
    told.end()


def _encoder(
    config: Raw2IdsConfig, facts: TokenizerFacts, given: pretokenized.Input, formats: tuple[str, ...], told: _Told
) -> ChunkEncoder:
    encoder: ChunkEncoder | None = None
    engine = open_engine(facts, config.engine, inert=given.chat, trust_remote_code=config.trust_remote_code)
    if given.chat:
        check_for_chat(facts)
        template, name = recipes.template_of(config, facts)
        plan = recipes.render_plan(
            config, facts, recipes.date_of(config, template, None) or "1970-01-01", short_cut=True
        )
        assembler = Assembler(engine=engine, lengths=TokenLengths(facts))
        encoder = recipes.chat_encoder(config, assembler, plan=plan, formats=formats)
        told.tell("format", [*dict.fromkeys(formats)], f"format: {', '.join(dict.fromkeys(formats))}")
        told.tell("template", name, f"template: {name}")
        warnings = [*recipes.template_warnings(plan)]
        told.tell("warnings", warnings, *(f"warning: {warning}" for warning in warnings))
    elif not given.all:
        encoder = recipes.pretrain_encoder(config, facts, engine)
        kinds = [*dict.fromkeys(source.kind for source in given.sources)]
        told.tell("format", kinds, f"format: documents ({', '.join(kinds)})")
    if given.some:
        encoder = pretokenized.ids_encoder(config, facts, given, encoder)
        told.tell("ids", "all" if given.all else "some", "format: ids" + " in some of the files" * (not given.all))
    assert encoder is not None
    return encoder


def _sample(config: Raw2IdsConfig, given: pretokenized.Input, encoder: ChunkEncoder) -> _Sample:
    sample = _Sample()
    for number, source in enumerate(given.sources):
        columns: Sequence[str] | None = None
        if source.kind == pretokenized.KIND:
            columns = pretokenized.READ
        elif not given.chat:
            columns = (config.text_field.split(".")[0],)
        for chunk in read_chunks(source, number, columns=columns, most=config.largest_record):
            left = RECORDS - sample.records
            if left <= 0:
                sample.whole = False
                return sample
            taken: Chunk = first_records(chunk, source.kind, left)
            sample.whole = sample.whole and taken is chunk
            sample.size += size_of(taken)
            sample.encoded.append((source, encoder(taken, source.kind)))
    return sample


def _special_tokens(facts: TokenizerFacts, documents: Sequence[Documents]) -> dict[str, int]:
    """How often each special token comes, the most frequent first."""
    counts: collections.Counter[int] = collections.Counter()
    names = {token["id"]: token["content"] for token in facts.added}
    for each in documents:
        found, times = np.unique(each.ids, return_counts=True)
        counts.update({index: n for index, n in zip(found.tolist(), times.tolist(), strict=True) if index in names})
    return {names[index]: n for index, n in counts.most_common()}


def _estimate(sources: Sequence[Source], sample: _Sample, tokens: int, size: int) -> tuple[dict[str, Any] | None, str]:
    """What the whole input would give, by the size of the sample, and in a line; None where that is not known."""
    if sample.whole:
        exact = {"tokens": tokens, "bytes": size, "is_estimate": False}
        return exact, f"the whole input: {tokens:,} tokens, {megabytes(size)} of shards"
    total = 0.0
    for source in sources:
        is_parquet = source.kind in ("parquet", pretokenized.KIND)  # whose chunks are measured in rows
        units: Any = open_parquet(source).metadata.num_rows if is_parquet else expansion(source)
        if units is None:
            return None, "the whole input: of unknown size"
        total += units
    share = max(1.0, total / max(1, sample.size))
    found = {"tokens": round(tokens * share), "bytes": int(size * share), "is_estimate": True}
    line = (
        f"the whole input: about {tokens * share:,.0f} tokens and {megabytes(int(size * share))} of shards (estimate)"
    )
    return found, line
