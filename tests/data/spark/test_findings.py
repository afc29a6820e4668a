"""What tasks found: each once however often it is said, and places become lines of files."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.prepare.reporting.totals import MAX_EXAMPLES
from jllm.data.sources.inputs import Source
from jllm.data.sources.records import RefusedRecordError
from jllm.data.spark.findings import Findings, together


def source(name: str) -> Source:
    return Source(path=f"/{name}", name=name, stem=name, kind="jsonl", compression=None, size=1)


@settings(deadline=None)
@given(
    lines=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    cuts=st.integers(1, 5),
    tasks=st.integers(1, 4),
    wrong=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_lines_whatever_parts_and_tasks(lines: list[int], cuts: int, tasks: int, wrong: float, seed: int) -> None:
    """Files of so many lines, cut into parts whose records are numbered by the task that read them, and dealt again to
    other tasks: counts are sums, examples are the first of the input."""
    draw = random.Random(seed)
    found = [Findings() for _ in range(tasks)]
    expected: dict[str, list[str]] = {}
    for file, count in enumerate(lines):
        edges = sorted({0, *(draw.randrange(count) for _ in range(cuts))})
        for begin, end in zip(edges, [*edges[1:], count], strict=True):
            base = draw.randrange(1 << 40)
            for line in range(begin, end):
                task = draw.choice(found)
                number = base + line - begin
                task.saw(file, begin * 100, number, number)
                kind = draw.choice("ab")
                is_bad = draw.random() < wrong
                task.count({"records": 1}, np.array([] if is_bad else [3], np.int64))
                if is_bad:
                    task.found_bad([((file, begin * 100, number), kind, "x")])
                    expected.setdefault(kind, []).append(f"f{file}:{line + 1}: {kind}: x")
    draw.shuffle(found)
    whole = together(found, [source(f"f{file}") for file in range(len(lines))])
    assert whole.totals.bad == {
        kind: {"count": len(places), "examples": places[:MAX_EXAMPLES]} for kind, places in expected.items()
    }
    assert list(whole.totals.bad) == list(expected), "in the order in which they come in the input"
    assert whole.totals.counts == {"records": sum(lines)}
    assert whole.totals.documents == sum(lines) - sum(map(len, expected.values()))
    assert whole.totals.document_tokens == 3 * whole.totals.documents
    assert whole.seen == frozenset(range(len(lines)))
    assert (whole.first_bad is None) == (not expected)
    if whole.first_bad is not None:
        name, record = whole.first_bad
        assert f"{name}:{record.line}: {record.kind}: x" == next(iter(expected.values()))[0]


def test_the_first_record_that_is_refused() -> None:
    found = [Findings(), Findings()]
    for task, (start, number) in zip(found, ((100, 7), (0, 5)), strict=True):
        task.saw(0, start, number, number + 1)
        task.found_refused((0, start, number + 1), RefusedRecordError("the one at", 3, f"of {start}"))
    whole = together(found, [source("f")])
    with pytest.raises(RefusedRecordError, match=r"^the one at f:2 of 0$"):
        raise whole.refused or AssertionError
