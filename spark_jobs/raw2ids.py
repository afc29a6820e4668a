"""Text and chat data to token-id shards on a Spark cluster: `jllm.raw2ids` for those who outgrow one machine.

    spark-submit spark_jobs/raw2ids.py -i hdfs:///corpus/*.jsonl -o hdfs:///ids --tokenizer ./qwen3 -t pretrain --stack

The flags are those of `jllm raw2ids`. Rows come from the same functions as the local command's: each partition is
one split, encoded and packed by itself. Lines of JSON and text files reach these functions as bytes, so that a bad
line is handled as it is locally; every other format that Spark reads (`--read_format`) comes as records.

What is written: Parquet files that the trainer and every local command read as they are, and `_manifest.json` with
rows, tokens, checksums, bad records and the engine. A record that a retried task met twice may count twice among the
bad. When a fast path fails its proof, the job starts over without it, as the local command does, and nothing of what
it had written stays. See docs/spark.md for clusters.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.formats import SAMPLE, commonest_format
from jllm.data.chat.records.conversation import LEFT_OUT, UNUSED
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.manifest import Manifest
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.encoding import ChunkEncoder, Encoded
from jllm.data.prepare.outputs import recorded_options
from jllm.data.prepare.restart import PROOF_ERRORS, Attempt, attempts
from jllm.data.prepare.totals import MAX_EXAMPLES, named
from jllm.data.sources.chunk import Chunk
from jllm.data.sources.parsing import parse_chunk
from jllm.data.spark import describe_output, remove_if_empty, schema_of, session, write_manifest_at, write_shards
from jllm.data.spark_errors import WorkerErrors
from jllm.data.tokenizer.checked_engine import open_engine
from jllm.data.tokenizer.engines import use_cores
from jllm.data.tokenizer.facts import TokenizerFacts, load_tokenizer
from jllm.errors import UserError
from jllm.options import command, option

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

LOCAL_ONLY = (
    "num", "batch_size", "max_rows", "max_tokens", "eval_fraction", "eval_output", "seed", "debug", "threads", "quiet",
    "cores",
)  # fmt: skip
"""Options of the local command that have no meaning here; partitions take the place of splits and workers."""
LINES = ("jsonl", "text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkRaw2IdsConfig(Raw2IdsConfig):
    """Options of the job: those of the local command, and how Spark reads and cuts the input."""

    output: str | None = option(  # type: ignore[assignment]  # a path would lose a slash of hdfs://
        None, "-o", help="data set folder, on any file system of Spark", metavar="FOLDER"
    )
    read_format: str = option(
        "jsonl", help="jsonl, text (documents between blank lines), or any format of Spark: parquet, orc, csv, ..."
    )
    partitions: int | None = option(None, help="partitions, each a split of its own  [default: as Spark reads them]")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in LOCAL_ONLY and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name}: only for the local command; Spark cuts the data set by --partitions")
        if self.output is None:
            raise UserError("-o: say where the data set goes")
        if self.input_format is not None:
            raise UserError("--input_format: on Spark use --read_format")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What the executors need. Travels to them once each task.

    Attributes:
        config: the options.
        attempt: which fast paths are taken.
        facts: a broadcast of the tokenizer's facts, which are large.
        chat: how conversations are rendered, as `recipes.chat_encoder` takes it; empty for documents.
        findings: an accumulator of what tasks found.
        errors: those that the driver waits for.
    """

    config: SparkRaw2IdsConfig
    attempt: Attempt
    facts: Any
    chat: dict[str, Any]
    findings: Any
    errors: WorkerErrors

    def __call__(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Records of one partition to rows."""
        with self.errors.carried():
            yield from self._rows(batches)

    def _rows(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        config, facts = self.config, self.facts.value
        encoder, prefix, engine = _opened_encoder(config, self.attempt, facts, self.chat)
        self.findings.add({**_nothing_found(), "engine": engine})
        packer = recipes.packer_of(config, facts, prefix)
        seen = 0
        for number, batch in enumerate(batches):
            encoded = encoder(chunk_of(batch, config.read_format, number, seen + 1), _kind(config))
            seen += batch.num_rows
            self.findings.add(_findings(encoded))
            rows = packer.feed(encoded.documents)
            if rows is not None:
                yield rows
        yield from packer.finish()


def _kind(config: SparkRaw2IdsConfig) -> str:
    return config.read_format if config.read_format in LINES else "parquet"


def chunk_of(batch: pa.RecordBatch, read_format: str, number: int, line: int) -> Chunk:
    """An Arrow batch as the chunk of records that the encoders take."""
    data: Any = pa.Table.from_batches([batch])
    if read_format in LINES:
        data = (b"\n" if read_format == "jsonl" else b"\n\n").join(batch.column(0).cast(pa.binary()).to_pylist())
    end = line + batch.num_rows
    return Chunk(source=0, index=number, line=line, data=data, end=end, end_line=end)


Opened = tuple[ChunkEncoder, tuple[int, ...], dict[str, Any]]
"""An encoder, the ids at the start of every row, and what the manifest says of the engine."""
_opened: dict[str, Opened] = {}


def _opened_encoder(
    config: SparkRaw2IdsConfig, attempt: Attempt, facts: TokenizerFacts, chat: dict[str, Any]
) -> Opened:
    """The encoder of this Python worker, which several tasks use one after the other."""
    key = f"{facts.sha256} {config} {attempt} {chat.get('plan')}"
    if key not in _opened:
        use_cores(1)  # Spark runs a worker on every core
        engine = open_engine(
            facts, attempt.engine, inert=config.type == "ft", trust_remote_code=config.trust_remote_code
        )
        prefix = recipes.ids_of(config.sequence_prefix or "", "sequence_prefix", engine, facts)
        encoder: ChunkEncoder
        if config.type == "pretrain":
            encoder = recipes.pretrain_encoder(config, facts, engine)
        else:
            assembler = Assembler(engine=engine, lengths=TokenLengths(facts))
            encoder = recipes.chat_encoder(config, lambda: assembler, **chat)
        _opened.clear()
        _opened[key] = encoder, prefix, attempt.record_of(engine)
    return _opened[key]


def _findings(encoded: Encoded) -> dict[str, Any]:
    bad: dict[str, Any] = {}
    for record in encoded.bad:
        kind = bad.setdefault(record.kind, {"count": 0, "examples": []})
        kind["count"] += 1
        if len(kind["examples"]) < MAX_EXAMPLES:
            kind["examples"].append(f"record {record.line} of its partition: {record.detail}")
    counts = {**encoded.counts, "documents": len(encoded.documents), "document_tokens": len(encoded.documents.ids)}
    return {"counts": counts, "bad": bad, "engine": None}


def merge_findings(total: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Add up what two tasks found."""
    for name, count in more["counts"].items():
        total["counts"][name] = total["counts"].get(name, 0) + count
    for kind, found in more["bad"].items():
        known = total["bad"].setdefault(kind, {"count": 0, "examples": []})
        known["count"] += found["count"]
        known["examples"] = sorted({*known["examples"], *found["examples"]})[:MAX_EXAMPLES]
    total["engine"] = more["engine"] or total["engine"]
    return total


def read_input(spark: "SparkSession", config: SparkRaw2IdsConfig) -> "DataFrame":
    """The records, as Spark reads them."""
    paths = list(config.input)
    if config.read_format == "jsonl":
        frame = spark.read.text(paths)
    elif config.read_format == "text":
        frame = spark.read.text(paths, wholetext=True)
    else:
        frame = spark.read.format(config.read_format).load(paths)
        if config.type == "pretrain":
            field = config.text_field.split(".")[0]
            if field not in frame.columns:
                raise UserError(f"-i: no column {field} (columns: {', '.join(frame.columns[:12])}); see --text_field")
            frame = frame.select(field)
    return frame.repartition(config.partitions) if config.partitions else frame


def chat_arguments(config: SparkRaw2IdsConfig, facts: TokenizerFacts, frame: "DataFrame") -> dict[str, Any]:
    """How conversations are read and rendered, decided once, on the driver."""
    if config.type != "ft":
        return {}
    template = recipes.template_text(config, facts)
    date = recipes.date_of(config, template, None)
    format_name = recipes.format_asked_for(config) or _format_of_input(config, frame)
    plan = recipes.render_plan(config, facts, date or "1970-01-01", short_cut=True)
    for warning in recipes.template_warnings(plan):
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return {"plan": plan, "formats": (format_name,), "pool": None}


def _format_of_input(config: SparkRaw2IdsConfig, frame: "DataFrame") -> str:
    sample = frame.limit(SAMPLE).toArrow().combine_chunks().to_batches()
    records = parse_chunk(chunk_of(sample[0], config.read_format, 0, 1), _kind(config)).values if sample else []
    return commonest_format(records, "-i")


def _document_suffix(config: SparkRaw2IdsConfig, facts: TokenizerFacts) -> tuple[int, ...] | None:
    """The ids that documents end in, as the tasks have them; None for conversations."""
    if config.type == "ft":
        return None
    engine = open_engine(facts, "hf", trust_remote_code=config.trust_remote_code)
    return recipes.affixes_of(config, facts, engine)[1]


def run(spark: "SparkSession", config: SparkRaw2IdsConfig) -> Manifest:
    """Encode, pack and write, and then the manifest of what was written.

    Raises:
        UserError: the input or the tokenizer does not fit the options, or the output exists.
    """
    facts = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    frame = read_input(spark, config)
    chat = chat_arguments(config, facts, frame)
    broadcast = spark.sparkContext.broadcast(facts)
    output = config.output
    assert output is not None  # checked with the options
    columns = recipes.packer_of(config, facts, (0,) if config.sequence_prefix else ()).columns

    def attempted(attempt: Attempt) -> dict[str, Any]:
        """Write the shards; what the tasks found."""
        errors = WorkerErrors((*PROOF_ERRORS, UserError))
        findings = _accumulator(spark)
        as_planned = {**chat, "plan": dataclasses.replace(chat["plan"], short_cut=attempt.short_cut)} if chat else {}
        job = Job(config=config, attempt=attempt, facts=broadcast, chat=as_planned, findings=findings, errors=errors)
        try:
            write_shards(frame.mapInArrow(job, schema_of(columns)), output, overwrite=config.clean)
        except Exception as error:  # Spark's own, of several kinds
            of_worker = errors.found_in(error)
            if of_worker is None:
                raise
            remove_if_empty(spark, output)
            raise of_worker from None
        found: dict[str, Any] = findings.value
        return found

    found = attempts(attempted, Attempt(choice=config.engine))
    engine = {**found["engine"], "checks": found["counts"].get("checks", 0)} if found["engine"] else None
    suffix = _document_suffix(config, facts)
    manifest = Manifest(
        command="spark_jobs/raw2ids",
        options={key: value for key, value in recorded_options(config).items() if key not in LOCAL_ONLY},
        files=describe_output(spark, output),
        tokenizer=dataclasses.replace(facts.for_manifest, document_end=suffix[-1] if suffix else None),
        labels_checked=True,
        chat_template=chat["plan"].template if chat else None,
        sources=tuple({"name": name.rsplit("/", 1)[-1]} for name in config.input),
        extra={
            **{name: count for name, count in found["counts"].items() if not name.startswith((LEFT_OUT, UNUSED))},
            "left_out": named(found["counts"], LEFT_OUT),
            "unused_fields": named(found["counts"], UNUSED),
            "bad_records": found["bad"],
            "engine": engine,
            **({} if suffix is None else {"document_end": recipes.document_end_record(config, facts, suffix)}),
        },
    )
    write_manifest_at(spark, output, manifest)
    return manifest


def _accumulator(spark: "SparkSession") -> Any:
    """Sums of what tasks found."""
    from pyspark.accumulators import AccumulatorParam

    class FindingsParam(AccumulatorParam[dict[str, Any]]):
        def zero(self, value: dict[str, Any]) -> dict[str, Any]:
            return _nothing_found()

        def addInPlace(self, value1: dict[str, Any], value2: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
            return merge_findings(value1, value2)

    return spark.sparkContext.accumulator(_nothing_found(), FindingsParam())


def _nothing_found() -> dict[str, Any]:
    return {"counts": {}, "bad": {}, "engine": None}


@command(SparkRaw2IdsConfig, name="raw2ids")
def main(config: SparkRaw2IdsConfig) -> None:
    """Turn text and chat data into token-id shards on a Spark cluster; flags as for jllm raw2ids."""
    spark = session("jllm raw2ids")
    manifest = run(spark, config)
    spark.stop()
    rows, tokens, files = manifest.rows, manifest.total("tokens"), len(manifest.files)
    print(f"{config.output}: {rows:,} rows, {tokens:,} tokens in {files} files")
    for name, count in [*manifest.extra["left_out"].items(), *manifest.extra["unused_fields"].items()]:
        print(f"  left out: {count:,} x {name}")
    for kind, found in manifest.extra["bad_records"].items():
        print(f"  {found['count']:,} bad records: {kind}, such as {found['examples'][0]}")


if __name__ == "__main__":
    main()
