"""What a run counts: documents and their lengths for each data set, bad records, bytes read.

Guarantees: counts are those of an uninterrupted run, however often a run was resumed; `encoded_bytes` alone is a run's
own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jllm.data.dataset.columns import Int64
from jllm.data.dataset.token_counts import length_bucket, quantile_length
from jllm.data.prepare.work import Counted
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError, printable

MAX_EXAMPLES = 5
BAD_SHARE, BAD_LEAST = 0.01, 10


@dataclasses.dataclass(kw_only=True)
class Tally:
    """The documents of one data set.

    Attributes:
        sources: for each source: documents and document tokens.
        lengths: documents by length: exact up to 256 tokens, then in steps of 1/32 of an octave.
        longest: the longest document.
    """

    sources: list[dict[str, int]] = dataclasses.field(default_factory=list)
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    longest: int = 0

    @property
    def documents(self) -> int:
        return sum(source["documents"] for source in self.sources)

    @property
    def document_tokens(self) -> int:
        return sum(source["document_tokens"] for source in self.sources)

    def snapshot(self) -> "Tally":
        """A copy, cheap enough to take before every chunk."""
        sources = self.sources[:-1] + [dict(source) for source in self.sources[-1:]]
        return Tally(sources=sources, lengths=dict(self.lengths), longest=self.longest)

    @classmethod
    def restored(cls, values: dict[str, Any]) -> "Tally":
        """The inverse of `dataclasses.asdict`, also after a round through JSON."""
        return cls(**{**values, "lengths": {int(bucket): count for bucket, count in values["lengths"].items()}})

    def add(self, source: int, lengths: Int64) -> None:
        """Count documents of these lengths."""
        while len(self.sources) <= source:
            self.sources.append({"documents": 0, "document_tokens": 0})
        self.sources[source]["documents"] += len(lengths)
        self.sources[source]["document_tokens"] += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max(initial=0)))
        for bucket, count in zip(*np.unique(length_bucket(lengths), return_counts=True), strict=True):
            self.lengths[int(bucket)] = self.lengths.get(int(bucket), 0) + int(count)

    def quantile(self, share: float) -> int:
        """The length that this share of the documents does not exceed, within 3 %."""
        return min(self.longest, quantile_length(self.lengths, share))


@dataclasses.dataclass(kw_only=True)
class Totals:
    """What was found in the sources, over the whole input.

    Attributes:
        counts: sums of `Encoded.counts`.
        bad: bad records by kind: how many, and the first few as "file:line detail".
        sets: the documents of each data set that is made.
        encoded_bytes: input that this run encoded (decompressed bytes; rows of Parquet).
        read_bytes: input behind everything counted here, whoever encoded it.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sets: list[Tally] = dataclasses.field(default_factory=list)
    encoded_bytes: int = 0
    read_bytes: int = 0

    @property
    def documents(self) -> int:
        return sum(tally.documents for tally in self.sets)

    @property
    def document_tokens(self) -> int:
        return sum(tally.document_tokens for tally in self.sets)

    @property
    def bad_records(self) -> int:
        return sum(kind["count"] for kind in self.bad.values())

    def snapshot(self) -> dict[str, Any]:
        """A copy as plain data but for the tallies, cheap enough to take before every chunk."""
        bad = {kind: {**found, "examples": list(found["examples"])} for kind, found in self.bad.items()}
        sets = [tally.snapshot() for tally in self.sets]
        return dict(self.__dict__, counts=dict(self.counts), bad=bad, sets=sets)

    @classmethod
    def restored(cls, snapshot: dict[str, Any], sets: int) -> "Totals":
        """The inverse of `dataclasses.asdict`, of totals or of what holds a snapshot, also after a round through JSON;
        nothing is encoded yet in this run. An empty one begins `sets` tallies."""
        if not snapshot:
            return cls(sets=[Tally() for _ in range(sets)])
        totals = cls(**{**snapshot, "sets": [Tally.restored(values) for values in snapshot["sets"]]})
        totals.encoded_bytes = 0
        return totals

    def add(self, name: str, encoded: Counted, size: int, fresh: bool) -> None:
        """Count a chunk of `size` bytes of the source `name`, but for its documents; `fresh` where this run encoded
        it."""
        self.read_bytes += size
        self.encoded_bytes += size if fresh else 0
        for key, value in encoded.counts.items():
            self.counts[key] = self.counts.get(key, 0) + value
        for record in encoded.bad:
            kind = self.bad.setdefault(record.kind, {"count": 0, "examples": []})
            kind["count"] += 1
            if len(kind["examples"]) < MAX_EXAMPLES:
                kind["examples"].append(describe(name, record))


def named(counts: Mapping[str, int], beginning: str) -> dict[str, int]:
    """The counts whose names begin so, without that, the largest first."""
    found = {name[len(beginning) :]: count for name, count in counts.items() if name.startswith(beginning)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def describe(name: str, record: BadRecord) -> str:
    """ "file:line: kind: detail", for people."""
    return printable(" ".join(f"{name}:{record.line}: {record.kind}: {record.detail}".split()))


def stopped_at(name: str, record: BadRecord) -> UserError:
    """What `--on_error stop` says of the first bad record."""
    return UserError(f"--on_error stop: {describe(name, record)}; repair it, or use --on_error skip")


def nothing_left(where: str, totals: Totals, *, eval_fraction: float | None, first_is_empty: bool) -> UserError:
    """Why a data set has not one row.

    Args:
        where: the option and the input, for people.
        eval_fraction: the share that was to be held out.
        first_is_empty: whether the data set that was asked for is empty, and not what was held out.
    """
    records, documents = totals.counts.get("records", 0), totals.documents
    if not records:
        reason = "is empty: there is no record in it"
    elif totals.bad_records == records:
        kind, found = next(iter(totals.bad.items()))
        reason = f"none of its {records:,} records can be used ({kind}: {found['count']:,}; {found['examples'][0]})"
    elif documents and not all(tally.documents for tally in totals.sets):
        which = "all" if first_is_empty else "none"
        reason = (
            f"--eval_fraction {eval_fraction} holds out {which} of its {documents:,} documents; give"
            " another fraction, or another --seed"
        )
    else:
        reason = f"no row is left of its {records:,} records; see --filter, --drop_tails, --overlong, --max_tokens"
    return UserError(f"{where}: {reason}")


def check_bad_share(totals: Totals) -> None:
    """The default of `--on_error`.

    Raises:
        UserError: more than 1 % and at least 10 of all records are bad.
    """
    records = totals.counts.get("records", 0)
    if totals.bad_records < BAD_LEAST or totals.bad_records <= BAD_SHARE * records:
        return
    kinds = ", ".join(f"{kind}: {found['count']}" for kind, found in totals.bad.items())
    example = next(iter(totals.bad.values()))["examples"][0]
    raise UserError(
        f"{totals.bad_records} of {records} records are bad ({kinds}; {example}): more than 1 %; repair the input, or"
        " take the rest with --on_error skip"
    )
