"""`raw2ids --dry_run`: what a run would do, shown on the first records, with nothing written.

Guarantees: the records go through the code of the run itself. What is said of them is so; what is said of the whole
input is an estimate, and called one.
Cost: the tokenizer, and `RECORDS` records on one core.
"""

import collections
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.shards import ShardWriter
from jllm.data.dataset.token_counts import count_trained
from jllm.data.packing.packers import Documents
from jllm.data.prepare import pretokenized, recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.outputs import NAMES_OF_OUR_FOLDERS
from jllm.data.prepare.totals import describe
from jllm.data.show import show_row
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
from jllm.options import describe_differences

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


def dry_run(config: Raw2IdsConfig) -> None:
    """Print what differs from the defaults, the format found, template and special tokens, some rows, the share of bad
    records, and estimates.

    Raises:
        UserError: what a run would refuse before it reads more than the first records, or that none of them is good.
    """
    say("\n".join(describe_differences(config)))
    sources = resolve(config.input, kind=config.input_format, passed_over=NAMES_OF_OUR_FOLDERS)
    recipes.field_map(config)
    use_cores(usable_cores(config.cores))
    given = pretokenized.recognised(config, sources)
    formats = recipes.formats_of(config, given.sources) if given.chat else ()
    facts = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    encoder = _encoder(config, facts, given, formats)
    sample = _sample(config, given, encoder)
    documents = [encoded.documents for _, encoded in sample.encoded if len(encoded.documents)]
    bad = [(source.name, record) for source, encoded in sample.encoded for record in encoded.bad]
    count = sum(map(len, documents))
    say(f"bad records: {len(bad):,} of the first {sample.records:,}")
    for name, record in bad[:EXAMPLES]:
        say(f"  {describe(name, record)}")
    if not documents:
        raise UserError(f"-i {' '.join(config.input)}: none of the first {sample.records:,} records can be used")
    say(f"special tokens: {_special_tokens(facts, documents)}")
    packer = recipes.packer_of(config, facts, labels=given.labels)
    fed = [packer.feed(each) for each in documents]
    batches = [batch for batch in (*fed, *packer.finish()) if batch is not None and batch.num_rows]
    rows = [row for batch in batches[:ROWS] for row in batch.slice(0, ROWS).to_pylist()][:ROWS]
    decode = make_decoder(config.tokenizer, facts.for_manifest)
    for number, row in enumerate(rows):
        show_row(number, row, decode, colored=False)
    tokens = sum(int(each.offsets[-1]) for each in documents)
    trained = sum(count_trained(batch) for batch in batches)
    say(f"{count:,} documents, {tokens:,} tokens, {trained:,} trained in {sum(b.num_rows for b in batches):,} rows")
    with (
        tempfile.TemporaryDirectory() as folder,
        ShardWriter(Path(folder, "sample.parquet"), columns=packer.columns, codec=config.compress) as writer,
    ):
        for batch in batches:
            writer.write(batch)
    say(_estimate(given.sources, sample, tokens, writer.statistics.bytes))
    say("dry run: nothing was written", flush=True)


def _encoder(
    config: Raw2IdsConfig, facts: TokenizerFacts, given: pretokenized.Input, formats: tuple[str, ...]
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
        encoder = recipes.chat_encoder(config, lambda: assembler, plan=plan, formats=formats, pool=None)
        say(f"format: {', '.join(dict.fromkeys(formats))}")
        say(f"template: {name}")
        for warning in recipes.template_warnings(plan):
            say(f"warning: {warning}")
    elif not given.all:
        encoder = recipes.pretrain_encoder(config, facts, engine)
        say(f"format: documents ({', '.join(dict.fromkeys(source.kind for source in given.sources))})")
    if given.some:
        encoder = pretokenized.ids_encoder(config, facts, given, encoder)
        say("format: ids in some of the files" if not given.all else "format: ids")
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
        for chunk in read_chunks(source, number, columns=columns):
            left = RECORDS - sample.records
            if left <= 0:
                sample.whole = False
                return sample
            taken: Chunk = first_records(chunk, source.kind, left)
            sample.whole = sample.whole and taken is chunk
            sample.size += size_of(taken)
            sample.encoded.append((source, encoder(taken, source.kind)))
    return sample


def _special_tokens(facts: TokenizerFacts, documents: Sequence[Documents]) -> str:
    counts: collections.Counter[int] = collections.Counter()
    names = {token["id"]: token["content"] for token in facts.added}
    for each in documents:
        found, times = np.unique(each.ids, return_counts=True)
        counts.update({index: n for index, n in zip(found.tolist(), times.tolist(), strict=True) if index in names})
    said = [f"{printable(names[index])} x {n:,}" for index, n in counts.most_common()]
    return ", ".join(said) or "none"


def _estimate(sources: Sequence[Source], sample: _Sample, tokens: int, size: int) -> str:
    """What the whole input would give, by the size of the sample."""
    if sample.whole:
        return f"the whole input: {tokens:,} tokens, {megabytes(size)} of shards"
    total = 0.0
    for source in sources:
        is_parquet = source.kind in ("parquet", pretokenized.KIND)  # whose chunks are measured in rows
        units: Any = open_parquet(source).metadata.num_rows if is_parquet else expansion(source)
        if units is None:
            return "the whole input: of unknown size"
        total += units
    share = max(1.0, total / max(1, sample.size))
    return (
        f"the whole input: about {tokens * share:,.0f} tokens and {megabytes(int(size * share))} of shards (estimate)"
    )
