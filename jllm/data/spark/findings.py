"""What the tasks of a job found, and what that is for the whole input.

Each task says what it found once, when it has made its last row, under the number of its partition. A task that Spark
ran twice says the same twice, and counts once. Places of records are told as file, part of the file, and number; when
all parts are known they become lines (rows) of the file.

Cost: for each task a few numbers for each part of a file that it read, and `MAX_EXAMPLES` bad records of each kind.
"""

import dataclasses
import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jllm.data.dataset.columns import Int64
from jllm.data.prepare.reporting.totals import MAX_EXAMPLES, Tally, Totals, describe
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import BadRecord, RefusedRecordError
from jllm.errors import UserError

Place = tuple[int, int, int]
"""The number of a source, the byte where a part of it begins, and the number of a record."""


@dataclasses.dataclass(kw_only=True)
class Findings:
    """What one task found.

    Attributes:
        counts: sums of `Encoded.counts`.
        bad: for each kind how many, and the first ones: place and detail.
        refused: the first record that the options do not allow: place, and the message around it.
        parts: for each part of a source the smallest and the largest number of its records, all of which are seen.
        tally: documents and their lengths.
        engine: what the manifest says of the engine.
    """

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    bad: dict[str, tuple[int, list[tuple[Place, str]]]] = dataclasses.field(default_factory=dict)
    refused: tuple[Place, str, str] | None = None
    parts: dict[tuple[int, int], tuple[int, int]] = dataclasses.field(default_factory=dict)
    tally: Tally = dataclasses.field(default_factory=Tally)
    engine: dict[str, Any] | None = None

    def count(self, counts: Mapping[str, int], lengths: Int64) -> None:
        """Add what became of some records."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.tally.add(0, lengths)

    def found_bad(self, bad: Iterable[tuple[Place, str, str]]) -> None:
        """Add bad records: place, kind and detail."""
        for place, kind, detail in bad:
            count, first = self.bad.get(kind, (0, []))
            self.bad[kind] = count + 1, heapq.nsmallest(MAX_EXAMPLES, [*first, (place, detail)])

    def found_refused(self, place: Place, error: RefusedRecordError) -> None:
        self.refused = min(filter(None, (self.refused, (place, error.before, error.after))))

    def saw(self, source: int, start: int, first: int, last: int) -> None:
        """Add records of a part of a source, by their numbers."""
        known = self.parts.get((source, start), (first, last))
        self.parts[source, start] = min(first, known[0]), max(last, known[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputFindings:
    """What all tasks found.

    Attributes:
        totals: as those of the local command; examples are in the order of the input.
        first_bad: the name of its source, and the record.
        refused: of the first record that the options do not allow.
        seen: the numbers of the sources in which there was anything.
        engine: see `Findings`.
    """

    totals: Totals
    first_bad: tuple[str, BadRecord] | None
    refused: UserError | None
    seen: frozenset[int]
    engine: dict[str, Any] | None


def together(found: Sequence[Findings], sources: Sequence[Source]) -> InputFindings:
    """What the tasks found, for the whole input.

    Args:
        found: of each task once, in any order.
    """
    parts: dict[tuple[int, int], tuple[int, int]] = {}
    for one in found:
        for part, (first, last) in one.parts.items():
            known = parts.get(part, (first, last))
            parts[part] = min(first, known[0]), max(last, known[1])
    before: dict[tuple[int, int], int] = {}
    reached: dict[int, int] = {}
    for part in sorted(parts):
        first, last = parts[part]
        before[part] = reached.get(part[0], 0) - first + 1
        reached[part[0]] = reached.get(part[0], 0) + last - first + 1

    def line_of(place: Place) -> int:
        return place[2] + before.get(place[:2], 0)

    totals = Totals(sets=[_joined_tally([one.tally for one in found])])
    bad: dict[str, tuple[int, list[tuple[Place, str]]]] = {}
    for one in found:
        for name, count in one.counts.items():
            totals.counts[name] = totals.counts.get(name, 0) + count
        for kind, (count, first_ones) in one.bad.items():
            known_count, known_ones = bad.get(kind, (0, []))
            bad[kind] = known_count + count, heapq.nsmallest(MAX_EXAMPLES, [*known_ones, *first_ones])
    for kind in sorted(bad, key=lambda kind: bad[kind][1][0]):
        examples = [
            describe(sources[place[0]].name, BadRecord(kind=kind, line=line_of(place), detail=detail))
            for place, detail in bad[kind][1]
        ]
        totals.bad[kind] = {"count": bad[kind][0], "examples": examples}
    first_bad = None
    if totals.bad:
        kind = next(iter(totals.bad))
        place, detail = bad[kind][1][0]
        first_bad = sources[place[0]].name, BadRecord(kind=kind, line=line_of(place), detail=detail)
    refused = min(filter(None, (one.refused for one in found)), default=None)
    mistake = None
    if refused is not None:
        place, before_it, after_it = refused
        mistake = RefusedRecordError(before_it, line_of(place), after_it, name=sources[place[0]].name)
    return InputFindings(
        totals=totals,
        first_bad=first_bad,
        refused=mistake,
        seen=frozenset(source for source, _ in parts),
        engine=next((one.engine for one in found if one.engine is not None), None),
    )


def _joined_tally(tallies: Sequence[Tally]) -> Tally:
    joined = Tally(sources=[{"documents": 0, "document_tokens": 0}])
    for tally in tallies:
        joined.sources[0]["documents"] += tally.documents
        joined.sources[0]["document_tokens"] += tally.document_tokens
        joined.longest = max(joined.longest, tally.longest)
        for bucket, count in tally.lengths.items():
            joined.lengths[bucket] = joined.lengths.get(bucket, 0) + count
    return joined
