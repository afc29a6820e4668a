"""`raw2ids` from its options to its manifest: what to read, with which engine, into which folder, and the report.

The order of things: resolve the input, load the tokenizer (in a child process, while the engines are built), hold the
output folder, fork the workers, which share the engines, convert, write the manifest, remove the work folder. When a
fast path fails its proof in the middle of a run, the run starts over without it (`restart.py`).
"""

import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from jllm.data.chat.assembler import Assembler
from jllm.data.chat.rendering import RenderPlan
from jllm.data.chat.token_spans import TokenLengths
from jllm.data.dataset.manifest import KINDS, FileEntry, Manifest, open_data_set, write_manifest
from jllm.data.packing.packers import Packer
from jllm.data.prepare import pretokenized, recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.control_classes import classes_of, columns_of, with_classes
from jllm.data.prepare.conversion import Conversion, UnreadableSourceError, convert, made_slots, sent_slots
from jllm.data.prepare.encoding import ChunkEncoder
from jllm.data.prepare.holdout import Holdout
from jllm.data.prepare.outputs import (
    NAMES_OF_OUR_FOLDERS,
    RULES,
    OutputSet,
    beside,
    changed_meanwhile,
    chat_record,
    clean_held_out,
    outputs_of,
    recorded_options,
    refuse_overlap,
    shown_input,
)
from jllm.data.prepare.reporting.bad_records import BadRecordLog, check_target
from jllm.data.prepare.reporting.progress import Progress, summary
from jllm.data.prepare.reporting.totals import Totals, check_bad_share, nothing_left
from jllm.data.prepare.restart import WAYS_OUT, Attempt, attempts
from jllm.data.prepare.saving.chunk_cache import ChunkCache
from jllm.data.prepare.saving.sink import Sink, SinkPlan
from jllm.data.prepare.work import Work
from jllm.data.sources.identity import modified_at, record_of
from jllm.data.sources.inputs import Source, resolve
from jllm.data.tokenizer.checked_engine import CheckedEngine, check_for_chat, open_engine
from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.engines import use_cores
from jllm.data.tokenizer.facts import TokenizerFacts, TokenizerLoading
from jllm.errors import UserError, of_file_system, say
from jllm.machine import usable_cores


def prepare(config: Raw2IdsConfig, begun: EarlyEngines | None = None) -> Manifest:
    """Make the data set of `config`, or find it finished.

    Args:
        config: the options.
        begun: engines that are being built already.

    Raises:
        UserError: anything the user can put right.
    """
    progress = Progress(quiet=config.quiet)
    recipes.field_map(config)  # whose mistakes need no input, and no tokenizer
    sources = resolve(config.input, kind=config.input_format, passed_over=NAMES_OF_OUR_FOLDERS)
    if config.control_class:
        classes_of(config.control_class, sources)
    output = config.output or beside(config, sources)
    cores = usable_cores(config.cores)
    use_cores(1)  # each worker has one
    outputs = outputs_of(config, output)
    refuse_overlap(config.input, sources, outputs)
    given = pretokenized.recognised(config, sources)
    is_done = not config.clean and all(each.place.holds_a_data_set for each in outputs)
    if config.bad_records is not None:
        check_target(config.bad_records, config.input, sources)
    if is_done:
        _refuse_finished(config, sources, output)
    loading = TokenizerLoading(config.tokenizer, trust_remote_code=config.trust_remote_code)
    try:
        with contextlib.ExitStack() as held:
            early = None
            if config.engine != "hf" and not is_done:
                early = begun
                if early is None or not early.fits(inert=given.chat, known=loading.known):
                    early = EarlyEngines(config.tokenizer, inert=given.chat, known=loading.known)
            # Before the tokenizer is there: a mistake need not wait for it.
            formats = recipes.formats_of(config, given.sources) if given.chat and not is_done else ()
            facts = loading.result()
            for each in outputs:
                held.enter_context(each.place.locked())
            # Before anything is removed, the run finds out what is wrong with its options.
            run = _Preparation(config, given, facts, outputs, cores, progress, early, formats)
            if config.clean:
                run.clean()
            try:
                manifest = run.result()
            except OSError as error:
                raise of_file_system(error) or error from None
    finally:
        loading.cancel()
    if config.debug:
        from jllm.data.show import show_rows
        from jllm.data.tokenizer.decoding import make_decoder

        show_rows(open_data_set(output), make_decoder(config.tokenizer, manifest.tokenizer), rows=config.debug)
    return manifest


def _refuse_finished(config: Raw2IdsConfig, sources: list[Source], output: Path) -> None:
    """Raises:
    UserError: the data set is there, and whether it is the one that is asked for, or was bad, nobody knows.
    """
    once = [source.path for source in sources if source.once]
    if once:
        raise UserError(
            f"-o {output}: holds a finished data set, and what -i {once[0]} gives now may be other data; start over"
            " with -C, or give another -o"
        )
    if config.bad_records is not None:
        raise UserError(
            f"--bad_records {config.bad_records}: the data set is finished, and only examples of its bad records are in"
            " its manifest; make it anew with -C"
        )


class _Preparation:
    """One run of the command: as many attempts as it takes."""

    def __init__(
        self,
        config: Raw2IdsConfig,
        given: pretokenized.Input,
        facts: TokenizerFacts,
        outputs: list[OutputSet],
        cores: int,
        progress: Progress,
        early: EarlyEngines | None,
        formats: tuple[str, ...],
    ) -> None:
        self.config = config
        self.given = given
        self.sources = given.sources
        self.facts = facts
        self.outputs = outputs
        self.place = outputs[0].place
        self.cores = cores
        self.progress = progress
        self.early = early
        self.formats = formats
        self.chat = given.chat
        self.log = BadRecordLog(self.place.work)
        self.warnings: list[str] = []
        self.document_end: int | None = None
        self.identity: dict[str, Any] = {
            "options": recorded_options(config),
            "tokenizer": facts.sha256,
            "rules": RULES,
            "template": None,
            "sources": [record_of(source) for source in given.sources],
        }
        if self.chat:
            check_for_chat(facts)
            template = recipes.template_text(config, facts)
            self.identity["template"] = recipes.template_hashes(config, facts)
            earlier = None if config.clean else self.place.date_of_earlier_run()
            self.identity["date"] = recipes.date_of(config, template, earlier)

    def _identity_of(self, output: OutputSet) -> dict[str, Any]:
        return {**self.identity, "options": {**self.identity["options"], **output.options}}

    def clean(self) -> None:
        """Remove what earlier runs left."""
        if len(self.outputs) == 1:
            clean_held_out(self.outputs[0])
        for output in self.outputs:
            output.place.clean()

    def result(self) -> Manifest:
        """The manifest, of this run or an earlier one."""
        finished = [output.place.finished(self._identity_of(output)) for output in self.outputs]
        found = [manifest for manifest in finished if manifest is not None]
        if len(found) == len(self.outputs):
            for output, manifest in zip(self.outputs, found, strict=True):
                output.place.close()
                rows, tokens = manifest.rows, manifest.total("tokens")
                say(f"{output.place.folder}: finished earlier: {rows:,} rows, {tokens:,} tokens")
            return found[0]
        if any(source.once for source in self.sources):
            for output in self.outputs:
                output.place.begin_afresh(self._identity_of(output))
        noted = {way_out: self.place.noted(way_out) for way_out in WAYS_OUT}
        reasons = {way_out: why for way_out, why in noted.items() if why is not None}
        return attempts(self._attempt, Attempt(choice=self.config.engine, reasons=reasons), self._start_over)

    def _start_over(self, attempt: Attempt) -> None:
        """Remove what was made, and leave a note for a run that goes on with this attempt.

        Raises:
            UserError: the input cannot be read again.
        """
        for source in self.sources:
            if source.once:
                self._leave_nothing()
                raise UserError(
                    f"-i {source.path}: cannot be read again from its begin; save it to a file, and give that"
                )
        for output in self.outputs:
            output.place.clean()
            output.place.remember(self._identity_of(output))
        for way_out, why in attempt.reasons.items():
            self.place.note(way_out, why)

    def _attempt(self, attempt: Attempt) -> Manifest:
        for output in self.outputs:
            output.place.discard_temporaries()
        config = self.config
        plan: RenderPlan | None = None
        encoder: ChunkEncoder | None = None
        suffix: tuple[int, ...] | None = None
        prefix: tuple[int, ...] = ()
        if self.chat:
            date = self.identity["date"] or "1970-01-01"
            plan = recipes.render_plan(config, self.facts, date, short_cut=attempt.short_cut)
            self._warn_of(plan)
            lengths = TokenLengths(self.facts)  # while the early engines are being built
            engine = self._open_engine(attempt)
            encoder = recipes.chat_encoder(
                config,
                Assembler(engine=engine, lengths=lengths),
                plan=plan,
                formats=self.formats,
                names=tuple(source.name for source in self.sources),
            )
        else:
            engine = self._open_engine(attempt)
            prefix = recipes.sequence_prefix(config, engine, self.facts)
            if not self.given.all:
                documents = recipes.pretrain_encoder(config, self.facts, engine)
                self.document_end = documents.suffix[-1] if documents.suffix else None
                encoder, suffix = documents, documents.suffix
        if self.given.some:
            encoder = pretokenized.ids_encoder(config, self.facts, self.given, encoder)
        assert encoder is not None
        encoder = with_classes(config.control_class, self.sources, encoder)
        try:
            entries, totals = self._convert(encoder, prefix)
        finally:
            if config.bad_records is not None:
                self.log.write_to(config.bad_records)
        self._refuse_changes()
        self._refuse_nothing(entries, totals)
        if config.on_error == "auto":
            check_bad_share(totals)
        record = {**attempt.record_of(engine), "checks": totals.counts.get("checks", 0)}
        sets = []
        for index, output in enumerate(self.outputs):
            manifest = self._manifest(record, plan, index, entries[index], totals)
            if suffix is not None:
                manifest.extra["document_end"] = recipes.document_end_record(config, self.facts, suffix)
            sets.append((output.place.folder, manifest))
        for folder, manifest in reversed(sets):  # the data set that was asked for is finished last
            write_manifest(folder, manifest)
        for output in self.outputs:
            output.place.close()
        self.progress.end()
        say(summary(sets, totals, config.max_len, self.progress.seconds), flush=True)
        return sets[0][1]

    def _open_engine(self, attempt: Attempt) -> CheckedEngine:
        remote_code = self.config.trust_remote_code
        engine = open_engine(
            self.facts, attempt.engine, inert=self.chat, trust_remote_code=remote_code, early=self.early
        )
        reason = attempt.record_of(engine)["reason"]
        if self.config.engine == "auto" and reason:
            say(f"engine: hf, not fastokens: {reason}", file=sys.stderr, flush=True)
        engine.load()
        return engine

    def _leave_nothing(self) -> None:
        for output in self.outputs:
            output.place.clean()

    def _refuse_changes(self) -> None:
        """Raises:
        UserError: a file of the input is no longer what it was when the run began.
        """
        for source, before in zip(self.sources, self.identity["sources"], strict=True):
            if before["modified"] is not None and modified_at(source.path) != before["modified"]:
                self._leave_nothing()
                raise changed_meanwhile(source)

    def _refuse_nothing(self, entries: list[list[FileEntry]], totals: Totals) -> None:
        """Raises:
        UserError: a data set has not one row; why, and with nothing left behind.
        """
        empty = [not sum(entry.rows for entry in files) for files in entries]
        if any(empty):
            self._leave_nothing()
            raise nothing_left(
                shown_input(self.config.input, len(self.sources)),
                totals,
                eval_fraction=self.config.eval_fraction,
                first_is_empty=empty[0],
            )

    def _manifest(
        self,
        engine: dict[str, Any],
        plan: RenderPlan | None,
        index: int,
        entries: list[FileEntry],
        totals: Totals,
    ) -> Manifest:
        tally = totals.sets[index]
        counted = tally.sources + [{"documents": 0, "document_tokens": 0}] * len(self.sources)
        extra: dict[str, Any] = {
            "documents": tally.documents,
            "document_tokens": tally.document_tokens,
            "longest_document": tally.longest,
            "bad_records": totals.bad,
            "engine": engine,
            "rules": RULES,
        }
        if plan is not None:
            extra["chat"] = chat_record(
                self.config,
                self.facts,
                self.identity["template"],
                self.formats,
                self.identity["date"],
                totals.counts,
                self.warnings,
            )
        return Manifest(
            command="raw2ids",
            options=self._identity_of(self.outputs[index])["options"],
            files=tuple(entries),
            tokenizer=dataclasses.replace(self.facts.for_manifest, document_end=self.document_end),
            sources=tuple(
                {**{key: source[key] for key in ("name", "bytes", "stem", "sample")}, **count}
                for source, count in zip(self.identity["sources"], counted, strict=False)
            ),
            labels_checked=True,
            kind=KINDS[self.config.type],
            further=columns_of(self.config.control_class),
            chat_template=plan.template if plan is not None else None,
            extra=extra,
        )

    def _convert(self, encoder: ChunkEncoder, prefix: tuple[int, ...]) -> tuple[list[list[FileEntry]], Totals]:
        """Make the files of all data sets."""
        config = self.config
        cache = ChunkCache(
            self.place.work,
            vocab_size=self.facts.vocab_size,
            sinks=[output.name for output in self.outputs],
        )
        packer = recipes.packer_of(config, self.facts, prefix, labels=self.given.labels)
        of_records = None if self.chat else (config.text_field.split(".")[0],)
        run = Conversion(
            sources=self.sources,
            columns=[
                self.given.columns(number) if each.kind == pretokenized.KIND else of_records
                for number, each in enumerate(self.sources)
            ],
            work=Work(
                encoder,
                cache,
                Holdout(fraction=config.eval_fraction, seed=config.seed),
                packer,
                codec=config.compress,
                largest_record=config.largest_record,
                sent=sent_slots(self.sources, self.cores),
                made=made_slots(self.cores),
            ),
            cache=cache,
            cores=self.cores,
            threads=config.threads,
            stop_at_first_bad=config.on_error == "stop",
            max_tokens=config.max_tokens,
            largest_record=config.largest_record,
            log=self.log,
        )
        sinks: list[Sink] = []
        try:
            with contextlib.ExitStack() as stack:
                sinks += [stack.enter_context(Sink(self._sink_plan(each, packer), cache)) for each in self.outputs]
                totals = convert(run, sinks, self.progress)
        except UnreadableSourceError as error:
            for sink in sinks:
                sink.roll_back(error.source)
            if error.source == 0:
                self._leave_nothing()
            for output in self.outputs if error.source else ():
                output.place.note_unreadable(error.source)
            raise
        return [sink.entries for sink in sinks], totals

    def _sink_plan(self, output: OutputSet, packer: Packer) -> SinkPlan:
        config = self.config
        return SinkPlan(
            folder=output.place.folder,
            work=output.place.work,
            name=output.name,
            packer=packer,
            codec=config.compress,
            per_split=_part_of(config.num, output.share),
            per_file=_part_of(config.batch_size, output.share),
            max_rows=config.max_rows,
        )

    def _warn_of(self, plan: RenderPlan) -> None:
        self.warnings = recipes.template_warnings(plan)
        for warning in self.warnings:
            say(f"warning: {warning}", file=sys.stderr, flush=True)
        if self.config.format == "auto":
            say(f"format: {', '.join(dict.fromkeys(self.formats))}", file=sys.stderr, flush=True)


def _part_of(count: int, share: float) -> int:
    return count if share == 1 else math.ceil(count * share)
