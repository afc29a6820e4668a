"""Text and chat data to token-id shards on a Spark cluster: `jllm.raw2ids` for those who outgrow one machine.

    spark-submit spark_jobs/raw2ids.py -i hdfs:///corpus/*.jsonl -o hdfs:///ids --tokenizer ./qwen3 -t pretrain --stack

The flags are those of `jllm raw2ids`, and so is what decides: which files an input names and what they are, what is a
bad record and how many of them are too many, what is refused, and whether a folder may be gone on with. Each partition
is one split, encoded and packed by itself.

What is written: Parquet files that the trainer and every local command read as they are, and `_manifest.json`. A job
that was killed is finished by the same line, with the same bytes. When a fast path fails its proof, the job starts over
without it, and nothing of what it had written stays. See docs/spark.md for clusters.
"""

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from jllm.data.dataset.manifest import KINDS as ROW_KINDS
from jllm.data.dataset.manifest import Manifest
from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.control_classes import classes_of, columns_of
from jllm.data.prepare.outputs import (
    RULES,
    changed_meanwhile,
    chat_record,
    is_parquet,
    recorded_options,
    refuse_place,
    shown_input,
)
from jllm.data.prepare.reporting.progress import summary
from jllm.data.prepare.reporting.totals import Totals, check_bad_share, nothing_left, stopped_at
from jllm.data.prepare.restart import PROOF_ERRORS, Attempt, attempts
from jllm.data.prepare.workplace import WORK_NAME, as_finished, compare, not_as_made, not_ours, refuse_sources
from jllm.data.sources.identity import is_same, is_same_since
from jllm.data.sources.inputs import KINDS, Source
from jllm.data.spark.encoding import FORMAT_SCHEMA, EncodingJob, FormatJob, GivenSources
from jllm.data.spark.failures import as_mistakes
from jllm.data.spark.files import HadoopFiles, is_local, local_path
from jllm.data.spark.findings import Findings, InputFindings, together
from jllm.data.spark.place import JobPlace
from jllm.data.spark.session import divide_streams, driver_of, job_session, set_up
from jllm.data.spark.shards import CODECS_OF_SPARK, describe_output, schema_of, write_shards
from jllm.data.spark.sources import (
    LINES,
    MARK_BYTES,
    ROWS,
    WAY_OF_IDS,
    SourceGroup,
    group_in_format,
    groups_of,
    paths_of,
    reading_of,
    recorded,
    resolved,
)
from jllm.data.spark.worker_errors import WorkerErrors
from jllm.data.tokenizer.checked_engine import check_for_chat, open_engine
from jllm.data.tokenizer.facts import load_tokenizer
from jllm.errors import UserError, say
from jllm.options import command, option

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

COMMAND = "spark_jobs/raw2ids"
LOCAL_ONLY = (
    "num", "batch_size", "max_rows", "max_tokens", "eval_fraction", "eval_output", "seed", "bad_records", "dry_run",
    "debug", "threads", "quiet", "cores",
)  # fmt: skip
"""Options of the local command that have no meaning here; partitions take the place of splits and workers."""
NOT_RECORDED = ("verbose", "json", *LOCAL_ONLY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparkRaw2IdsConfig(Raw2IdsConfig):
    """Options of the job: those of the local command, and how Spark reads and cuts the input."""

    output: str | None = option(  # type: ignore[assignment]  # a path would lose a slash of hdfs://
        None, "-o", help="data set folder, on any file system of Spark", metavar="FOLDER"
    )
    read_format: str | None = option(
        None,
        help="a format of Spark: orc, csv, ...; or one of --input_format  [default: what names say]",
        metavar="FORMAT",
    )
    partitions: int | None = option(None, help="partitions, each a split of its own  [default: as Spark reads them]")
    verbose: bool = option(False, help="show the logs of Spark, and Python's warnings")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.name in LOCAL_ONLY and getattr(self, field.name) != field.default:
                raise UserError(f"--{field.name}: only for the local command; Spark cuts the data set by --partitions")
        if self.output is None:
            raise UserError("-o: say where the data set goes")
        if self.read_format is not None and self.input_format is not None:
            raise UserError("--input_format: not together with --read_format, which says it too")
        if self.partitions is not None and self.partitions < 1:
            raise UserError(f"--partitions {self.partitions}: give at least 1")
        if self.compress not in CODECS_OF_SPARK:
            raise UserError(f"--compress {self.compress}: Spark does not write it; give {', '.join(CODECS_OF_SPARK)}")
        if self.kind == "ids":
            raise UserError(f"--input_format ids: only for the local command; {WAY_OF_IDS}")

    @property
    def kind(self) -> str | None:
        """What the options say that all files are."""
        return self.read_format if self.read_format in KINDS else self.input_format

    @property
    def format_of_spark(self) -> str | None:
        """The format that Spark alone knows, where the options name one."""
        return None if self.read_format in KINDS else self.read_format


class SparkPreparation:
    """One run of the job.

    Args:
        spark: the session.
        config: the options.
    """

    def __init__(self, spark: "SparkSession", config: SparkRaw2IdsConfig) -> None:
        assert config.output is not None  # checked with the options
        set_up(spark)
        self.spark = spark
        self.config = config
        self.files = HadoopFiles(spark)
        self.begun = time.monotonic()
        recipes.field_map(config)  # whose mistakes need no input
        self.sources = self._sources()
        if config.control_class:
            classes_of(config.control_class, self.sources)
        self.where = shown_input(config.input, len(self.sources))
        self.place = JobPlace(self.files, config.output, work=WORK_NAME, command=COMMAND)
        self._refuse_overlap()
        self.facts = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        if config.is_chat:
            check_for_chat(self.facts)

    def _sources(self) -> list[Source]:
        if self.config.format_of_spark is None:
            return resolved(self.files, self.config.input, self.config.kind)
        given = " ".join(self.config.input)
        return [Source(path=given, name=given, stem="data", kind="parquet", compression=None, size=None)]

    def _refuse_overlap(self) -> None:
        def place_of(path: str) -> PurePosixPath:
            full = self.files.qualified(path)
            return PurePosixPath(os.path.realpath(local_path(full)) if is_local(full) else full)

        folders = []
        for given in self.config.input:
            status = self.files.status(self.files.qualified(given)) if not set(given) & set("*?[]{}") else None
            if status is not None and status.is_folder:
                folders.append((given, place_of(given)))
        spark_format = self.config.format_of_spark is not None
        parquet = (
            [] if spark_format else [(each.path, place_of(each.path)) for each in self.sources if is_parquet(each)]
        )
        refuse_place(self.place.shown, place_of(self.place.shown), folders, parquet)

    def result(self) -> tuple[Manifest, str]:
        """The manifest, of this run or an earlier one, and what is said of it."""
        with self.place.held(driver_of(self.spark)):
            template = recipes.template_text(self.config, self.facts) if self.config.is_chat else ""
            earlier = self.place.begun(("options", "tokenizer", "sources"))
            began = None if self.config.clean else (earlier or {}).get("date")
            self.date = recipes.date_of(self.config, template, began)
            identity = self._identity()
            if self.config.clean:
                self.place.clean()
                earlier = None
            finished = self._finished(identity)
            if finished is not None:
                return finished, f"finished earlier: {finished.rows:,} rows, {finished.total('tokens'):,} tokens"
            if earlier is not None:
                compare(self.place.shown, identity, earlier)
                refuse_sources(self.place.shown, identity["sources"], earlier["sources"], is_same)
                pending = self.place.pending()
                if pending is not None:
                    self.place.move(pending)
                    return pending, f"finished: {pending.rows:,} rows, {pending.total('tokens'):,} tokens"
            elif self.place.pending() is not None:  # of an earlier --clean that was killed
                self.place.clean()
            if self.place.shards():
                raise not_ours(self.place.shown)
            # Spark cuts the input by the cores that there are, which may be others when a killed job is finished.
            parallel = (earlier or {}).get("parallel") or self.spark.sparkContext.defaultParallelism
            self.spark.conf.set("spark.sql.files.minPartitionNum", str(parallel))
            try:
                return self._made({**identity, "parallel": parallel})
            finally:
                self.spark.conf.unset("spark.sql.files.minPartitionNum")

    def _identity(self) -> dict[str, Any]:
        options = {name: value for name, value in recorded_options(self.config).items() if name not in NOT_RECORDED}
        identity = {
            "options": options,
            "tokenizer": self.facts.sha256,
            "rules": RULES,
            "template": recipes.template_hashes(self.config, self.facts) if self.config.is_chat else None,
            "sources": [self._recorded(each) for each in self.sources],
            "date": self.date,
        }
        plain: dict[str, Any] = json.loads(json.dumps(identity))
        return plain

    def _recorded(self, source: Source) -> dict[str, Any]:
        if self.config.format_of_spark:
            return {
                "name": source.name,
                "bytes": None,
                "stem": source.stem,
                "sample": None,
                "modified": None,
                "changed": None,
            }
        return recorded(self.files, source)

    def _finished(self, identity: dict[str, Any]) -> Manifest | None:
        manifest = self.place.manifest()
        if manifest is None:
            return None
        shown = self.place.shown
        compare(shown, identity, as_finished(manifest))
        made_at = self.place.finished_at
        refuse_sources(
            shown, identity["sources"], manifest.sources, lambda now, then: is_same_since(now, then, made_at)
        )
        changed = self.place.changed(manifest)
        if changed is not None:
            raise not_as_made(shown, changed)
        return manifest

    def _made(self, record: dict[str, Any]) -> tuple[Manifest, str]:
        config = self.config
        staged = self.place.begin(record)
        groups = self._groups()
        given = [self._given(group) for group in groups]
        chat = self._chat_arguments(groups, given)
        warnings = recipes.template_warnings(chat["plan"]) if chat else []
        for warning in warnings:
            say(f"warning: {warning}")

        def attempted(attempt: Attempt) -> InputFindings:
            self.files.remove(staged)
            return self._encoded(attempt, groups, given, chat, staged)

        found = attempts(attempted, Attempt(choice=config.engine))
        for source, before in zip(self.sources, record["sources"], strict=True):
            if self._recorded(source)["modified"] != before["modified"]:
                raise changed_meanwhile(source)
        for number, source in enumerate(self.sources):
            if reading_of(source) == LINES and (source.size or 0) > MARK_BYTES and number not in found.seen:
                raise UserError(f"-i {source.path}: Spark passed over it; give it another name")
        totals = found.totals
        entries = () if not totals.documents else self._described(staged)
        self._judge(found, sum(entry.rows for entry in entries))
        engine = {**(found.engine or {}), "checks": totals.counts.get("checks", 0)}
        suffix = self._document_suffix()
        tally = totals.sets[0]
        manifest = Manifest(
            command=COMMAND,
            options=record["options"],
            files=entries,
            tokenizer=dataclasses.replace(self.facts.for_manifest, document_end=suffix[-1] if suffix else None),
            labels_checked=True,
            kind=ROW_KINDS[self.config.type],
            further=columns_of(self.config.control_class),
            chat_template=chat["plan"].template if chat else None,
            sources=tuple(
                {key: each[key] for key in ("name", "bytes", "stem", "sample")} for each in record["sources"]
            ),
            extra={
                "documents": tally.documents,
                "document_tokens": tally.document_tokens,
                "longest_document": tally.longest,
                "bad_records": totals.bad,
                "engine": engine,
                "rules": RULES,
                **(
                    {"chat": chat_record(
                        config, self.facts, record["template"], chat["formats"], self.date, totals.counts, warnings
                    )} if chat else {}
                ),
                **({} if suffix is None else {"document_end": recipes.document_end_record(config, self.facts, suffix)}),
            },
        )  # fmt: skip
        manifest = self.place.finish(staged, manifest, config.compress)
        totals.encoded_bytes = sum(each.size or 0 for each in self.sources)
        lines = summary([(Path(), manifest)], totals, config.max_len, time.monotonic() - self.begun)
        return manifest, lines.removeprefix(".: ")

    def _described(self, staged: str) -> tuple[Any, ...]:
        with as_mistakes(f"-o {self.place.shown}", f"-o {self.place.shown}"):
            self.place.settle(staged)
            return describe_output(self.spark, staged)

    def _judge(self, found: InputFindings, rows: int) -> None:
        """Raises:
        UserError: what the local command refuses too.
        """
        totals: Totals = found.totals
        if self.config.on_error == "stop" and found.first_bad is not None:
            raise stopped_at(*found.first_bad)
        if found.refused is not None:
            raise found.refused
        if not rows:
            raise nothing_left(self.where, totals, eval_fraction=None, first_is_empty=True)
        if self.config.on_error == "auto":
            check_bad_share(totals)

    def _groups(self) -> list[SourceGroup]:
        config = self.config
        if config.format_of_spark is None:
            groups = groups_of(self.spark, self.files, self.sources, partitions=config.partitions, shown=self.where)
        else:
            groups = [
                group_in_format(
                    self.spark, config.format_of_spark, config.input, partitions=config.partitions, shown=self.where
                )
            ]
        rows = [source for source in self.sources if is_parquet(source)]
        return [group.with_needed_columns(config, rows[0]) if group.reading == ROWS else group for group in groups]

    def _given(self, group: SourceGroup) -> Any:
        numbers = {} if self.config.format_of_spark else paths_of(self.files, self.sources)
        given = GivenSources(
            sources=tuple(self.sources),
            numbers=numbers,
            reading=group.reading,
            largest_record=self.config.largest_record,
        )
        return self.spark.sparkContext.broadcast(given)

    def _chat_arguments(self, groups: Sequence[SourceGroup], given: Sequence[Any]) -> dict[str, Any]:
        """How conversations are read and rendered, decided once, on the driver."""
        config = self.config
        if not config.is_chat:
            return {}
        asked = recipes.format_asked_for(config)
        formats = (asked,) * len(self.sources) if asked else self._formats(groups, given)
        plan = recipes.render_plan(config, self.facts, self.date or "1970-01-01", short_cut=True)
        return {"plan": plan, "formats": formats}

    def _formats(self, groups: Sequence[SourceGroup], given: Sequence[Any]) -> tuple[str, ...]:
        found: dict[int, Any] = {}
        for group, sources in zip(groups, given, strict=True):
            errors = WorkerErrors((UserError,))
            job = FormatJob(given=sources, errors=errors)
            with as_mistakes(self.where, self.where), errors.raised():
                for row in group.frame.mapInArrow(job, FORMAT_SCHEMA).collect():
                    found[row.source] = row
        for number in sorted(found):
            if found[number].mistake:
                raise UserError(found[number].mistake)
        return tuple(found[number].format if number in found else "messages" for number in range(len(self.sources)))

    def _encoded(
        self,
        attempt: Attempt,
        groups: Sequence[SourceGroup],
        given: Sequence[Any],
        chat: dict[str, Any],
        staged: str,
    ) -> InputFindings:
        """Write the shards of one attempt; what the tasks found."""
        config = Raw2IdsConfig(
            **{each.name: getattr(self.config, each.name) for each in dataclasses.fields(Raw2IdsConfig)}
        )  # whose class the executors have, wherever this file lies
        errors = WorkerErrors((*PROOF_ERRORS, UserError))
        findings = found_by_tasks(self.spark)
        facts = self.spark.sparkContext.broadcast(self.facts)
        if chat:
            chat = {**chat, "plan": dataclasses.replace(chat["plan"], short_cut=attempt.short_cut)}
        packer = recipes.packer_of(config, self.facts, (0,) if config.sequence_prefix else ())
        encoded = None
        for group, sources in zip(groups, given, strict=True):
            job = EncodingJob(
                config=config,
                attempt=attempt,
                facts=facts,
                given=sources,
                chat=chat,
                findings=findings,
                errors=errors,
            )
            rows = group.frame.mapInArrow(job, schema_of(packer.columns, packer.further))
            encoded = rows if encoded is None else encoded.union(rows)
        assert encoded is not None
        with as_mistakes(self.where, f"-o {self.place.shown}"), errors.raised():
            write_shards(encoded, staged, codec=config.compress)
        return together([found for _, found in sorted(findings.value.items())], self.sources)

    def _document_suffix(self) -> tuple[int, ...] | None:
        """The ids that documents end in, as the tasks have them; None for conversations."""
        if self.config.is_chat:
            return None
        engine = open_engine(self.facts, "hf", trust_remote_code=self.config.trust_remote_code)
        return recipes.affixes_of(self.config, self.facts, engine)[1]


FoundByTask = dict[tuple[str, int], Findings]


def found_by_tasks(spark: "SparkSession") -> Any:
    """An accumulator of what tasks found: what one says twice, it says once."""
    from pyspark.accumulators import AccumulatorParam

    class FindingsParam(AccumulatorParam[FoundByTask]):
        def zero(self, value: FoundByTask) -> FoundByTask:
            return {}

        def addInPlace(self, value1: FoundByTask, value2: FoundByTask) -> FoundByTask:  # noqa: N802
            return value1 | value2

    return spark.sparkContext.accumulator({}, FindingsParam())


def run(spark: "SparkSession", config: SparkRaw2IdsConfig) -> Manifest:
    """Encode, pack and write, and then the manifest of what was written.

    Raises:
        UserError: whatever the local command refuses too.
    """
    return SparkPreparation(spark, config).result()[0]


@command(SparkRaw2IdsConfig, name="raw2ids")
def main(config: SparkRaw2IdsConfig) -> None:
    """Turn text and chat data into token-id shards on a Spark cluster; flags as for jllm raw2ids."""
    with job_session("jllm raw2ids", verbose=config.verbose) as spark:
        _, said = SparkPreparation(spark, config).result()
    say(f"{config.output}: {said}")


if __name__ == "__main__":
    divide_streams()
    main()
