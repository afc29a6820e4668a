"""`raw2ids` from its options to its manifest: what to read, with which engine, into which folder, and the report.

The order of things: resolve the input, start the processes that render conversations, load the tokenizer (in a child
process, while the engines are built), hold the output folder, convert, write the manifest, remove the work folder.
Conversations are rendered ahead of the engine, which is there after a second. When a fast path turns out to
differ from the reference in the middle of a run (`EngineMismatchError`, `ShortCutError`), the run says so and starts
over without it.
"""

import contextlib
import errno
import hashlib
import math
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np

from jllm.data.chat import render_workers
from jllm.data.chat.encoder import Assembler, ChatEncoder, TokenLengths
from jllm.data.chat.rendering import RenderPlan, ShortCutError
from jllm.data.dataset.manifest import FileEntry, Manifest, open_data_set, write_manifest
from jllm.data.packing.packers import Documents
from jllm.data.prepare import holdout, pretokenized, recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.conversion import Conversion, Encoder, Totals, check_bad_share, convert, remove_blocks_before
from jllm.data.prepare.parts import Part, beside, clean_held_out, parts_of, recorded_options
from jllm.data.prepare.progress import Progress, summary
from jllm.data.prepare.sink import Sink, SinkPlan
from jllm.data.prepare.workplace import modified_at
from jllm.data.sources.inputs import resolve, without_password
from jllm.data.tokenizer.early import EarlyEngines
from jllm.data.tokenizer.engine import CheckedEngine, EngineMismatchError, check_for_chat, open_engine, use_cores
from jllm.data.tokenizer.facts import TokenizerFacts, TokenizerLoading
from jllm.errors import UserError
from jllm.machine import usable_cores


def prepare(config: Raw2IdsConfig) -> Manifest:
    """Make the data set of `config`, or find it finished.

    Raises:
        UserError: anything the user can put right.
    """
    progress = Progress(quiet=config.quiet)
    sources = resolve(config.input, kind=config.input_format)
    output = config.output or beside(config, sources)
    cores = usable_cores(config.cores)
    use_cores(cores)
    parts = parts_of(config, output)
    given = pretokenized.recognised(config, sources)
    is_done = not config.clean and all(part.place.holds_a_data_set for part in parts)
    loading = TokenizerLoading(config.tokenizer, trust_remote_code=config.trust_remote_code)
    try:
        with contextlib.ExitStack() as held:
            renders = given.chat and not config.threads and not is_done
            renderers = held.enter_context(render_workers.workers(cores if renders else 1))
            early = None
            if config.engine != "hf" and not is_done:
                early = EarlyEngines(config.tokenizer, inert=given.chat, known=loading.known)
            facts = loading.result()
            for part in parts:
                held.enter_context(part.place.locked())
            # Before anything is removed, the run finds out what is wrong with its options.
            run = _Run(config, given, facts, parts, cores, progress, early, renderers)
            if config.clean:
                run.clean()
            try:
                manifest = run.result()
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"-o {output}: the disk is full; free some space and run the same command again: what is"
                        " finished stays"
                    ) from None
                raise
    finally:
        loading.cancel()
    if config.debug:
        from jllm.data.dataset.show import show_rows
        from jllm.data.tokenizer.decoding import make_decoder

        show_rows(open_data_set(output), make_decoder(config.tokenizer, manifest.tokenizer), rows=config.debug)
    return manifest


class _Run:
    """One run of the command, and again without a fast path that failed its proof."""

    def __init__(
        self,
        config: Raw2IdsConfig,
        given: pretokenized.Input,
        facts: TokenizerFacts,
        parts: list[Part],
        cores: int,
        progress: Progress,
        early: EarlyEngines | None,
        renderers: Executor | None,
    ) -> None:
        self.config = config
        self.given = given
        self.sources = given.sources
        self.facts = facts
        self.parts = parts
        self.place = parts[0].place
        self.cores = cores
        self.progress = progress
        self.early = early
        self.renderers = renderers
        self.chat = given.chat
        self.warnings: list[str] = []
        self.identity: dict[str, Any] = {
            "options": recorded_options(config),
            "tokenizer": facts.sha256,
            "sources": [
                {"name": source.name, "bytes": source.size, "stem": source.stem, "modified": modified_at(source.path)}
                for source in given.sources
            ],
        }
        if self.chat:
            check_for_chat(facts)
            template, _ = recipes.template_of(config, facts)
            earlier = None if config.clean else self.place.date_of_earlier_run()
            self.identity["date"] = recipes.date_of(config, template, earlier)

    def _identity_of(self, part: Part) -> dict[str, Any]:
        return {**self.identity, "options": {**self.identity["options"], **part.options}}

    def clean(self) -> None:
        """Remove what earlier runs left."""
        if len(self.parts) == 1:
            clean_held_out(self.parts[0])
        for part in self.parts:
            part.place.clean()

    def result(self) -> Manifest:
        finished = [part.place.finished(self._identity_of(part)) for part in self.parts]
        found = [manifest for manifest in finished if manifest is not None]
        if len(found) == len(self.parts):
            for part, manifest in zip(self.parts, found, strict=True):
                part.place.close()
                rows, tokens = manifest.rows, manifest.total("tokens")
                print(f"{part.place.folder}: finished earlier: {rows:,} rows, {tokens:,} tokens")
            return found[0]
        while True:
            for part in self.parts:
                part.place.discard_temporaries()
            try:
                return self._attempt()
            except (EngineMismatchError, ShortCutError) as error:
                what = "hf engine" if isinstance(error, EngineMismatchError) else "no short cut"
                if what == "hf engine" and self.config.engine == "fastokens":
                    raise UserError(f"--engine fastokens: {error}; use --engine auto or hf") from None
                print(f"{error}; starting over with the {what}", file=sys.stderr, flush=True)
                for part in self.parts:
                    part.place.clean()
                    part.place.remember(self._identity_of(part))
                self.place.note(what, str(error))

    def _attempt(self) -> Manifest:
        config = self.config
        plan: RenderPlan | None = None
        encoder: Encoder | None = None
        prefix: tuple[int, ...] = ()
        if self.chat:  # conversations are rendered while the engine is being opened
            plan = self._render_plan()
            opening = ThreadPoolExecutor(1, thread_name_prefix="engine")
            assembler = opening.submit(self._open_assembler)
            opening.shutdown(wait=False)
            encoder = self._chat_encoder(plan, assembler.result)
        else:
            engine = self._open_engine()
            prefix = self._sequence_prefix(engine)
            if not self.given.all:
                encoder = recipes.pretrain_encoder(config, self.facts, engine)
        if self.given.some:
            encoder = pretokenized.encoder_of(config, self.facts, self.given, encoder)
        assert encoder is not None
        entries, totals = self._convert(encoder, prefix)
        if self.chat:
            engine = assembler.result().engine
        if config.on_error == "auto":
            check_bad_share(totals)
        self._refuse_nothing(entries, totals)
        sets = []
        for index, part in enumerate(self.parts):
            manifest = self._manifest(engine, plan, index, entries[index], totals)
            sets.append((part.place.folder, manifest))
        for folder, manifest in reversed(sets):  # the data set that was asked for is finished last
            write_manifest(folder, manifest)
        for part in self.parts:
            part.place.close()
        self.progress.end()
        print(summary(sets, totals, config.max_len, self.progress.seconds), flush=True)
        return sets[0][1]

    def _open_engine(self) -> CheckedEngine:
        mismatch = self.place.noted("hf engine")
        choice = "hf" if mismatch and self.config.engine == "auto" else self.config.engine
        engine = open_engine(
            self.facts, choice, inert=self.chat, trust_remote_code=self.config.trust_remote_code, early=self.early
        )
        reason = mismatch or engine.reason
        if self.config.engine == "auto" and reason:
            print(f"engine: hf, not fastokens: {reason}", file=sys.stderr, flush=True)
        return engine

    def _open_assembler(self) -> Assembler:
        lengths = TokenLengths(self.facts)  # while the early engines are being built
        return Assembler(engine=self._open_engine(), lengths=lengths)

    def _refuse_nothing(self, entries: list[list[FileEntry]], totals: Totals) -> None:
        """Raises:
        UserError: a part has not one row; why, and with nothing left behind.
        """
        empty = [not sum(entry.rows for entry in files) for files in entries]
        if not any(empty):
            return
        given = " ".join(without_password(name) for name in self.config.input)
        where = f"-i {given}" + (f" ({len(self.sources)} files)" if len(self.sources) > 1 else "")
        records, documents = totals.counts.get("records", 0), totals.documents
        if not records:
            reason = "is empty: there is no record in it"
        elif totals.bad_records == records:
            kind, found = next(iter(totals.bad.items()))
            reason = f"none of its {records:,} records can be used ({kind}: {found['count']:,}; {found['examples'][0]})"
        elif documents and not all(tally.documents for tally in totals.sets):
            which = "all" if empty[0] else "none"
            reason = (
                f"--eval_fraction {self.config.eval_fraction} holds out {which} of its {documents:,} documents; give"
                " another fraction, or another --seed"
            )
        else:
            reason = f"no row is left of its {records:,} records; see --filter, --drop_tails, --overlong, --max_tokens"
        for part in self.parts:
            part.place.clean()
        raise UserError(f"{where}: {reason}")

    def _render_plan(self) -> RenderPlan:
        date = self.identity["date"] or "1970-01-01"
        short_cut = self.place.noted("no short cut") is None
        return recipes.render_plan(self.config, self.facts, date, short_cut=short_cut)

    def _manifest(
        self,
        engine: CheckedEngine,
        plan: RenderPlan | None,
        part: int,
        entries: list[FileEntry],
        totals: Totals,
    ) -> Manifest:
        tally = totals.sets[part]
        counted = tally.sources + [{"documents": 0, "document_tokens": 0}] * len(self.sources)
        extra: dict[str, Any] = {
            "documents": tally.documents,
            "document_tokens": tally.document_tokens,
            "longest_document": tally.longest,
            "bad_records": totals.bad,
            "engine": {
                "name": engine.name,
                "version": engine.version,
                "reason": self.place.noted("hf engine") or engine.reason,
                "probes": engine.probes,
                "checks": totals.counts.get("checks", 0),
            },
        }
        if plan is not None:
            extra["chat"] = {
                "template": recipes.template_of(self.config, self.facts)[1],
                "template_sha256": hashlib.sha256(plan.template.encode()).hexdigest(),
                "formats": list(dict.fromkeys(self.forms)),
                "date": self.identity["date"] or None,
                "overlong": totals.counts.get("overlong", 0),
                "warnings": self.warnings,
            }
        return Manifest(
            command="raw2ids",
            options=self._identity_of(self.parts[part])["options"],
            files=tuple(entries),
            tokenizer=self.facts.for_manifest,
            sources=tuple(
                {"name": source.name, "bytes": source.size, "stem": source.stem, **count}
                for source, count in zip(self.sources, counted, strict=False)
            ),
            extra=extra,
        )

    def _sequence_prefix(self, engine: CheckedEngine) -> tuple[int, ...]:
        prefix = recipes.ids_of(self.config.sequence_prefix or "", "sequence_prefix", engine, self.facts)
        if len(prefix) > self.config.max_len - 2:
            raise UserError(f"--sequence_prefix: {len(prefix)} tokens leave no room in rows of {self.config.max_len}")
        return prefix

    def _convert(self, encoder: Encoder, prefix: tuple[int, ...]) -> tuple[list[list[FileEntry]], Totals]:
        """Make the files of all parts."""
        config, place = self.config, self.place
        sinks: list[Sink] = []

        def committed() -> None:
            if len(sinks) == len(self.parts):
                remove_blocks_before(place.work, min(sink.committed.place for sink in sinks))

        def deal(documents: Documents) -> list[Documents]:
            if config.eval_fraction is None:
                return [documents]
            chosen = holdout.held_out(documents, config.eval_fraction, config.seed)
            return [documents.take(np.flatnonzero(wanted)) for wanted in (~chosen, chosen)]

        with contextlib.ExitStack() as stack:
            sinks += [stack.enter_context(Sink(self._sink_plan(part, prefix), committed)) for part in self.parts]
            run = Conversion(
                sources=self.sources,
                encoder=encoder,
                work=place.work,
                workers=self.cores,
                vocab_size=self.facts.vocab_size,
                columns=None if self.chat else [config.text_field.split(".")[0]],
                stop_at_first_bad=config.on_error == "stop",
                max_tokens=config.max_tokens,
                from_disk=config.packing == "best_fit",
            )
            totals = convert(run, sinks, deal, lambda totals: self.progress.show(totals, self.sources))
        return [sink.entries for sink in sinks], totals

    def _sink_plan(self, part: Part, prefix: tuple[int, ...]) -> SinkPlan:
        config = self.config
        return SinkPlan(
            folder=part.place.folder,
            work=part.place.work,
            name=part.name,
            packer=lambda: recipes.packer_of(config, self.facts, prefix, labels=self.given.labels),
            codec=config.compress,
            per_split=math.ceil(config.num * part.share),
            per_file=math.ceil(config.batch_size * part.share),
            max_rows=config.max_rows,
            threads=self.cores,
        )

    def _chat_encoder(self, plan: RenderPlan, assembler: Callable[[], Assembler]) -> ChatEncoder:
        self.warnings = recipes.template_warnings(plan)
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        self.forms = recipes.forms_of(self.config, self.sources)
        if self.config.format == "auto":
            print(f"format: {', '.join(dict.fromkeys(self.forms))}", file=sys.stderr, flush=True)
        return recipes.chat_encoder(self.config, assembler, plan=plan, forms=self.forms, pool=self.renderers)
