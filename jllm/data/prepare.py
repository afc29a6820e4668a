"""`raw2ids` from its options to its manifest: what to read, with which engine, into which folder, and the report.

The order of things: resolve the input, load the tokenizer (in a child process, while the engine's packages are
imported), hold the output folder, convert, write the manifest, remove the work folder. A fast engine that turns out
to differ from the reference in the middle of a run makes the run start over with the reference.
"""

import dataclasses
import errno
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jllm.data import packing
from jllm.data.convert import (
    Conversion,
    Totals,
    check_bad_share,
    convert,
    remove_blocks_before,
)
from jllm.data.encode import PretrainEncoder, pretrain_affixes
from jllm.data.engine import CheckedEngine, EngineMismatchError, open_engine, use_cores
from jllm.data.manifest import Manifest, write_manifest
from jllm.data.packing import Documents, Packer
from jllm.data.sink import Sink, SinkPlan
from jllm.data.sources import Source, resolve
from jllm.data.tokenizer import TokenizerFacts, TokenizerLoading, base_name
from jllm.data.workplace import Workplace, modified_at
from jllm.errors import UserError

if TYPE_CHECKING:
    from jllm.raw2ids import Raw2IdsConfig

NOT_IN_THE_MANIFEST = ("input", "output", "tokenizer", "cores", "threads", "clean", "on_error", "engine")
"""Options that do not decide what is made, or that the manifest records in another place."""


def usable_cores(cores: int) -> int:
    """The number of workers for `--cores`."""
    return len(os.sched_getaffinity(0)) if cores < 0 else cores


def prepare(config: "Raw2IdsConfig") -> Manifest:
    """Make the data set of `config`, or find it finished.

    Raises:
        UserError: anything the user can put right.
    """
    started = time.monotonic()
    sources = resolve(config.input, kind=config.input_format)
    output = config.output or _beside(config, sources)
    loading = TokenizerLoading(config.tokenizer, trust_remote_code=config.trust_remote_code)
    try:
        cores = usable_cores(config.cores)
        use_cores(cores)
        place = Workplace(output)
        with place.locked():
            if config.clean:
                place.clean()
            facts = loading.result()
            try:
                return _prepare(config, sources, facts, place, cores, started)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise UserError(
                        f"-o {output}: the disk is full; free some space and run the same command again: what is"
                        " finished stays"
                    ) from None
                raise
    finally:
        loading.cancel()


def _beside(config: "Raw2IdsConfig", sources: list[Source]) -> Path:
    first = config.input[0]
    if first == "-" or "://" in first:
        raise UserError(f"-i {first}: say where the data set goes with -o")
    stem = sources[0].stem if len(sources) == 1 else Path(first.split("*")[0]).name or "data"
    parent = Path(first.split("*")[0])
    parent = parent if parent.is_dir() and "*" in first else parent.parent
    return parent / f"{stem}_{base_name(config.tokenizer)}"


def _identity(config: "Raw2IdsConfig", sources: list[Source], facts: TokenizerFacts) -> dict[str, Any]:
    return {
        "options": recorded_options(config),
        "tokenizer": facts.sha256,
        "sources": [
            {"name": source.name, "bytes": source.size, "stem": source.stem, "modified": modified_at(source.path)}
            for source in sources
        ],
    }


def recorded_options(config: "Raw2IdsConfig") -> dict[str, Any]:
    """The options that decide what is made, as plain data."""
    values = dataclasses.asdict(config)
    return {key: value for key, value in values.items() if key not in NOT_IN_THE_MANIFEST}


def _prepare(
    config: "Raw2IdsConfig",
    sources: list[Source],
    facts: TokenizerFacts,
    place: Workplace,
    cores: int,
    started: float,
) -> Manifest:
    identity = _identity(config, sources, facts)
    finished = place.finished(identity)
    if finished is not None:
        place.close()
        print(f"{place.folder}: finished earlier: {finished.rows:,} rows, {finished.total('tokens'):,} tokens")
        return finished
    place.discard_temporaries()
    choice = config.engine
    mismatch_note = place.work / "mismatch"
    if choice == "auto" and mismatch_note.exists():
        choice = "hf"
    engine = open_engine(facts, choice, trust_remote_code=config.trust_remote_code)
    note = mismatch_note.read_text() if mismatch_note.exists() else engine.reason
    if config.engine == "auto" and note:
        print(f"engine: hf ({note})", file=sys.stderr)
    try:
        entries, totals = _convert(config, sources, facts, engine, place, cores)
    except EngineMismatchError as error:
        if config.engine != "auto":
            raise UserError(f"--engine {config.engine}: {error}; use --engine auto or hf") from None
        print(f"engine: {error}; starting over with hf", file=sys.stderr)
        place.clean()
        place.remember(identity)
        mismatch_note.write_text(str(error))
        return _prepare(config, sources, facts, place, cores, started)
    if config.on_error == "auto":
        check_bad_share(totals)
    manifest = Manifest(
        command="raw2ids",
        options=recorded_options(config),
        files=tuple(entries),
        tokenizer=facts.for_manifest,
        sources=tuple(
            {"name": source.name, "bytes": source.size, "stem": source.stem, **counted}
            for source, counted in zip(sources, _padded(totals, len(sources)), strict=True)
        ),
        extra={
            "documents": totals.documents,
            "document_tokens": totals.document_tokens,
            "longest_document": totals.longest,
            "bad_records": totals.bad,
            "engine": {
                "name": engine.name,
                "version": engine.version,
                "reason": note,
                "probes": engine.probes,
                "checks": totals.counts.get("checks", 0),
            },
        },
    )
    write_manifest(place.folder, manifest)
    place.close()
    _report(place.folder, manifest, totals, time.monotonic() - started)
    return manifest


def _padded(totals: Totals, count: int) -> list[dict[str, int]]:
    return totals.sources + [{"documents": 0, "document_tokens": 0}] * (count - len(totals.sources))


def _convert(
    config: "Raw2IdsConfig",
    sources: list[Source],
    facts: TokenizerFacts,
    engine: CheckedEngine,
    place: Workplace,
    cores: int,
) -> tuple[list[Any], Totals]:
    prefix, suffix = pretrain_affixes(facts)
    encoder = PretrainEncoder(
        engine=engine, prefix=prefix, suffix=suffix, field=config.text_field, parse_special=config.parse_special
    )
    plan = SinkPlan(
        folder=place.folder,
        work=place.work,
        name="main",
        packer=lambda: make_packer(config),
        codec=config.compress,
        per_split=config.num,
        per_file=config.batch_size,
        max_rows=config.max_rows,
    )
    run = Conversion(
        sources=sources,
        encoder=encoder,
        work=place.work,
        workers=cores,
        vocab_size=facts.vocab_size,
        columns=[config.text_field.split(".")[0]],
        stop_at_first_bad=config.on_error == "stop",
        max_tokens=config.max_tokens,
    )
    sinks: list[Sink] = []

    def committed() -> None:
        remove_blocks_before(place.work, min(sink.committed.place for sink in sinks))

    def deal(source: int, first: int, documents: Documents) -> list[Documents]:
        return [documents]

    with Sink(plan, committed) as sink:
        sinks.append(sink)
        totals = convert(run, sinks, deal, lambda totals: None)
    return sink.entries, totals


def make_packer(config: "Raw2IdsConfig") -> Packer:
    """The packer that the options ask for."""
    if config.stack:
        return packing.StackPacker(config.max_len, drop_tail=config.drop_tails)
    return packing.WindowPacker(config.max_len, stride=config.stride, drop_tail=config.drop_tails)


def _report(folder: Path, manifest: Manifest, totals: Totals, seconds: float) -> None:
    speed = totals.encoded_bytes / 1e6 / seconds
    print(
        f"{folder}: {totals.documents:,} documents, {totals.document_tokens:,} tokens in {manifest.rows:,} rows of at"
        f" most {manifest.longest_row or 0} tokens, {manifest.total('trained_tokens'):,} trained; {seconds:.1f} s,"
        f" {speed:.1f} MB/s"
    )
    for kind, found in totals.bad.items():
        print(f"  {found['count']:,} bad records: {kind}; the first: {found['examples'][0]}")
