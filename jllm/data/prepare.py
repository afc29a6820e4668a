"""`raw2ids` from its options to its manifest: what to read, with which engine, into which folder, and the report.

The order of things: resolve the input, load the tokenizer (in a child process, while the engine's packages are
imported), hold the output folder, convert, write the manifest, remove the work folder. When a fast path turns out to
differ from the reference in the middle of a run (`EngineMismatchError`, `ShortCutError`), the run says so and starts
over without it.
"""

import contextlib
import errno
import hashlib
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from jllm.data import holdout, pretokenized, recipes, render_work
from jllm.data.chat import TokenLengths
from jllm.data.convert import Conversion, Encoder, Totals, check_bad_share, convert, remove_blocks_before
from jllm.data.early_engines import EarlyEngines
from jllm.data.engine import CheckedEngine, EngineMismatchError, open_engine, use_cores
from jllm.data.machine import usable_cores
from jllm.data.manifest import FileEntry, Manifest, write_manifest
from jllm.data.packing import Documents
from jllm.data.parts import Part, beside, clean_held_out, parts_of, recorded_options
from jllm.data.progress import Progress, summary
from jllm.data.rendering import RenderPlan, ShortCutError
from jllm.data.sink import Sink, SinkPlan
from jllm.data.sources import Source, resolve, without_password
from jllm.data.tokenizer import TokenizerFacts, TokenizerLoading
from jllm.data.workplace import modified_at
from jllm.errors import UserError

if TYPE_CHECKING:
    from jllm.raw2ids import Raw2IdsConfig


def prepare(config: "Raw2IdsConfig") -> Manifest:
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
    loading = TokenizerLoading(config.tokenizer, trust_remote_code=config.trust_remote_code)
    try:
        early = None
        if config.engine != "hf":
            early = EarlyEngines(config.tokenizer, inert=config.type == "ft", known=loading.known)
        facts = loading.result()
        with contextlib.ExitStack() as held:
            for part in parts:
                held.enter_context(part.place.locked())
            # Before anything is removed, the run finds out what is wrong with its options.
            run = _Run(config, sources, facts, parts, cores, progress, early)
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
        from jllm.inspect import show_rows

        show_rows(output, config.tokenizer, rows=config.debug)
    return manifest


class _Run:
    """One run of the command, and again without a fast path that failed its proof."""

    def __init__(
        self,
        config: "Raw2IdsConfig",
        sources: list[Source],
        facts: TokenizerFacts,
        parts: list[Part],
        cores: int,
        progress: Progress,
        early: EarlyEngines | None,
    ) -> None:
        self.config = config
        self.given = pretokenized.recognised(config, sources)
        self.sources = self.given.sources
        self.facts = facts
        self.parts = parts
        self.place = parts[0].place
        self.cores = cores
        self.progress = progress
        self.early = early
        self.chat = config.type == "ft" and not self.given.all
        self.identity: dict[str, Any] = {
            "options": recorded_options(config),
            "tokenizer": facts.sha256,
            "sources": [
                {"name": source.name, "bytes": source.size, "stem": source.stem, "modified": modified_at(source.path)}
                for source in sources
            ],
        }
        if self.chat:
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
        with render_work.workers(self.cores if self.chat and not self.config.threads else 1) as self.renderers:
            return self._made()

    def _made(self) -> Manifest:
        """The data set, made; also where a fast path turns out to be wrong on the way."""
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
        config, place = self.config, self.place
        mismatch = place.noted("hf engine")
        choice = "hf" if mismatch and config.engine == "auto" else config.engine
        early = self.early if self.chat == (config.type == "ft") else None
        lengths = TokenLengths(self.facts) if self.chat else None  # while the early engines are being built
        engine = open_engine(
            self.facts, choice, inert=self.chat, trust_remote_code=config.trust_remote_code, early=early
        )
        reason = mismatch or engine.reason
        if config.engine == "auto" and reason:
            print(f"engine: hf, not fastokens: {reason}", file=sys.stderr, flush=True)
        plan = self._render_plan() if self.chat else None
        self.warnings = recipes.template_warnings(plan) if plan else []
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        encoder = self._encoder(engine, plan, lengths)
        entries, totals = self._convert(engine, encoder)
        if config.on_error == "auto":
            check_bad_share(totals)
        self._refuse_nothing(entries, totals)
        sets = []
        for index, part in enumerate(self.parts):
            manifest = self._manifest(engine, reason, plan, index, entries[index], totals)
            sets.append((part.place.folder, manifest))
        for folder, manifest in reversed(sets):  # the data set that was asked for is finished last
            write_manifest(folder, manifest)
        for part in self.parts:
            part.place.close()
        self.progress.end()
        print(summary(sets, totals, config.max_len, self.progress.seconds), flush=True)
        return sets[0][1]

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
        reason: str,
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
                "reason": reason,
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

    def _convert(self, engine: CheckedEngine, encoder: Encoder) -> tuple[list[list[FileEntry]], Totals]:
        """Make the files of all parts."""
        config, place, facts = self.config, self.place, self.facts
        prefix = recipes.ids_of(config.sequence_prefix or "", "sequence_prefix", engine, facts)
        if len(prefix) > config.max_len - 2:
            raise UserError(f"--sequence_prefix: {len(prefix)} tokens leave no room in rows of {config.max_len}")
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
                vocab_size=facts.vocab_size,
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

    def _encoder(self, engine: CheckedEngine, plan: RenderPlan | None, lengths: TokenLengths | None) -> Encoder:
        """What encodes a block, whatever its source holds."""
        others: Encoder | None = None
        if plan is not None:
            self.forms = recipes.forms_of(self.config, self.sources)
            if self.config.format == "auto":
                print(f"format: {', '.join(dict.fromkeys(self.forms))}", file=sys.stderr, flush=True)
            chat = {"plan": plan, "forms": self.forms, "lengths": lengths, "pool": self.renderers}
            others = recipes.encoder_of(self.config, self.facts, engine, **chat)
        elif not self.given.all:
            others = recipes.encoder_of(self.config, self.facts, engine)
        if self.given.some:
            return pretokenized.encoder_of(self.config, self.facts, self.given, others)
        assert others is not None
        return others
