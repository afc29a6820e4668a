"""What a person sees of `raw2ids`: a line while it runs, and a summary at the end."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jllm.data.chat.records.conversation import LEFT_OUT, UNUSED
from jllm.data.dataset.manifest import PREFERENCE, Manifest
from jllm.data.dataset.token_counts import quantile_length
from jllm.data.prepare.encoding import LENGTHS
from jllm.data.prepare.reporting.totals import Totals, named
from jllm.data.sources.inputs import Source
from jllm.errors import say

EVERY_SECONDS = 5.0
FIRST_AFTER = 10.0
MOST_FIELDS = 20
COUNTED_IN_BYTES = ("text", "jsonl", "json")


class Progress:
    """A line on standard error every few seconds: megabytes, tokens, both per second, and the time that is left."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.started = time.monotonic()
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._next = self.started + (1.0 if self._terminal else FIRST_AFTER)
        self._first: tuple[float, int, int] | None = None
        self._shown = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def show(self, totals: Totals, sources: Sequence[Source]) -> None:
        """Called after each chunk; prints when it is time to."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, totals.encoded_bytes, totals.document_tokens)
        if self._quiet or now < self._next:
            return
        self._next = now + (1.0 if self._terminal else EVERY_SECONDS)
        begun, first_bytes, first_tokens = self._first
        seconds = max(now - begun, 1e-9)
        speed = (totals.encoded_bytes - first_bytes) / seconds
        tokens = (totals.document_tokens - first_tokens) / seconds
        line = (
            f"{totals.encoded_bytes / 1e6:,.0f} MB  {totals.documents:,} documents  {totals.document_tokens:,} tokens "
            f" {speed / 1e6:.1f} MB/s  {tokens / 1e6:.2f} M tokens/s{self._left(totals, sources, speed)}"
        )
        say(line, end="\r" if self._terminal else "\n", file=sys.stderr, flush=True)
        self._shown = True

    def _left(self, totals: Totals, sources: Sequence[Source], speed: float) -> str:
        plain = [source.size for source in sources if source.compression is None and source.kind in COUNTED_IN_BYTES]
        sizes = [size for size in plain if size is not None]
        if len(sizes) != len(sources) or speed <= 0:
            return ""
        seconds = max(0, sum(sizes) - totals.read_bytes) / speed
        return f"  {seconds // 60:.0f}:{seconds % 60:02.0f} left"

    def end(self) -> None:
        if self._shown and self._terminal:
            say(file=sys.stderr)


def summary(sets: Sequence[tuple[Path, Manifest]], totals: Totals, max_len: int, seconds: float) -> str:
    """The lines printed when the data sets of a run, each a folder and its manifest, are finished."""
    lines: list[str] = []
    for (folder, manifest), tally in zip(sets, totals.sets, strict=True):
        tokens, trained = manifest.total("tokens") or 0, manifest.total("trained_tokens") or 0
        room = manifest.rows * max_len
        what = "pairs" if manifest.kind == PREFERENCE else "documents"
        lines += [
            f"{folder}: " + (_speed(totals, seconds) if not lines else "held out for evaluation"),
            f"  {what} {tally.documents:,} with {tally.document_tokens:,} tokens; lengths: half up to"
            f" {tally.quantile(0.5):,}, 90 % up to {tally.quantile(0.9):,}, 99 % up to {tally.quantile(0.99):,},"
            f" longest {tally.longest:,}",
            f"  rows {manifest.rows:,} in {len(manifest.files):,} files; tokens {tokens:,}, trained {trained:,}"
            f" ({100 * trained / max(1, tokens):.1f} %); {100 * tokens / max(1, room):.1f} % of rows x {max_len}"
            " filled",
        ]
    end = sets[0][1].extra.get("document_end")
    if end is not None:
        said = f"{end['token']} ({', '.join(map(str, end['ids']))})" if end["ids"] else "nothing"
        lines.append(f"  documents end in {said}")
    for side, beginning in LENGTHS.items():
        lengths = {int(bucket): count for bucket, count in named(totals.counts, beginning).items()}
        if lengths:
            half, most = (quantile_length(lengths, share) for share in (0.5, 1.0))
            lines.append(
                f"  {side} conversations {sum(lengths.values()):,}: half up to {half:,} tokens, longest about {most:,}"
            )
    if totals.counts.get("overlong"):
        what = "conversations" if sets[0][1].kind != PREFERENCE else "preference pairs"
        lines.append(f"  dropped {totals.counts['overlong']:,} {what} longer than {max_len} tokens")
    lines += notes(totals.counts)
    for kind, found in totals.bad.items():
        lines.append(f"  bad: {found['count']:,} x {kind}; first: {found['examples'][0]}")
    engine = sets[0][1].extra["engine"]
    lines.append(
        f"  engine {engine['name']} {engine['version']}: {engine['probes'] + engine['checks']:,} comparisons with the"
        " reference, all equal" if engine["name"] == "fastokens" else f"  engine {engine['name']} {engine['version']}"
    )  # fmt: skip
    return "\n".join(lines)


def notes(counts: Mapping[str, int]) -> list[str]:
    """What was left out of records that are used, a line each, and the fields of which nothing was made, in one."""
    lines = [f"  left out: {count:,} x {name}" for name, count in named(counts, LEFT_OUT).items()]
    fields = named(counts, UNUSED)
    if fields:
        shown = [f"{name} {count:,}" for name, count in list(fields.items())[:MOST_FIELDS]]
        more = f", and {len(fields) - MOST_FIELDS:,} more" if len(fields) > MOST_FIELDS else ""
        lines.append(f"  fields that nothing was made of: {', '.join(shown)}{more}")
    return lines


def _speed(totals: Totals, seconds: float) -> str:
    return f"finished in {seconds:.1f} s, {totals.encoded_bytes / 1e6 / seconds:.1f} MB/s"
