"""What a run counts, and when it fails for what is bad."""

import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.dataset.token_counts import length_bucket
from jllm.data.packing.pieces import Block, Pieces
from jllm.data.prepare.reporting.totals import MAX_EXAMPLES, Tally, Totals, check_bad_share
from jllm.data.prepare.saving.sink import ResumePoint
from jllm.data.prepare.work import Counted
from jllm.data.sources.records import BadRecord
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, raw2ids


def test_bad_records_are_counted_and_refused(tmp_path: Path, byte_tokenizer: Path) -> None:
    lines = [json.dumps({"text": text}) for text in documents(100)]
    lines[20:31] = ["{bad"] * 11
    source = tmp_path / "some.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["-i", source, "-o", tmp_path / "out", "--tokenizer", byte_tokenizer, "-t", "pretrain", "--stack"]
    refused = raw2ids(*arguments, check=False)
    assert refused.returncode == 2
    assert re.search(r"11 of 100 records.*some\.jsonl:21", refused.stderr)
    stopped = raw2ids(*arguments, "--on_error", "stop", "-C", check=False)
    assert stopped.returncode == 2
    assert "some.jsonl:21" in stopped.stderr
    raw2ids(*arguments, "--on_error", "skip")
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["documents"] == 89
    assert manifest["bad_records"]["bad JSON"]["count"] == 11
    assert len(manifest["bad_records"]["bad JSON"]["examples"]) == 5


EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))
lengths_of_chunks = st.lists(st.lists(st.integers(1, 100_000), max_size=20), min_size=1, max_size=5)


@settings(max_examples=EXAMPLES, deadline=None)
@given(chunks=lengths_of_chunks, share=st.floats(0.01, 1))
def test_tallies_are_sums_and_quantiles(chunks: list[list[int]], share: float) -> None:
    tally = Tally()
    for number, lengths in enumerate(chunks):
        tally.add(number, np.array(lengths, dtype=np.int64))
    every = sorted(itertools.chain(*chunks))
    assert tally.documents == len(every)
    assert tally.document_tokens == sum(every)
    assert tally.longest == max(every, default=0)
    assert [source["documents"] for source in tally.sources] == [len(lengths) for lengths in chunks]
    if every:
        wanted = every[max(0, int(np.ceil(share * len(every) - 1e-9)) - 1)]
        assert 0.97 * wanted <= tally.quantile(share) <= 1.03 * wanted
    buckets = length_bucket(np.array(every, dtype=np.int64)).tolist()
    assert buckets == sorted(buckets)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    chunks=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.sampled_from("ab"), max_size=9), st.booleans()), max_size=6
    )
)
def test_totals_survive_a_restart_between_any_chunks(chunks: list[tuple[int, list[str], bool]]) -> None:
    """As plain data and as JSON; a snapshot does not change with what is counted after it."""
    nothing = np.empty(0, np.int64)
    whole, restarted = (Totals.restored({}, 2) for _ in range(2))
    for size, kinds, fresh in chunks:
        bad = [BadRecord(kind=kind, line=line, detail="x") for line, kind in enumerate(kinds)]
        counted = Counted(
            block=Block("", 0, 4, None), lengths=nothing, held_out=None, pieces=Pieces(starts=nothing, sizes=nothing),
            bad=bad, counts={"records": 10}, end=0, lines=0, fresh=fresh,
        )  # fmt: skip
        before = whole.snapshot()
        frozen = json.dumps(ResumePoint(totals=before).to_json())
        whole.add("a.jsonl", counted, size, fresh)
        whole.sets[0].add(0, np.array([size + 1]))
        restarted.add("a.jsonl", counted, size, fresh)
        restarted.sets[0].add(0, np.array([size + 1]))
        assert json.dumps(ResumePoint(totals=before).to_json()) == frozen
        restarted = Totals.restored(json.loads(json.dumps(dataclasses.asdict(restarted))), 2)
        assert restarted.encoded_bytes == 0
    restarted.encoded_bytes = whole.encoded_bytes
    assert restarted == whole
    assert whole.read_bytes == sum(size for size, _, _ in chunks)
    assert whole.encoded_bytes == sum(size for size, _, fresh in chunks if fresh)
    assert whole.bad_records == sum(len(kinds) for _, kinds, _ in chunks)
    assert all(len(found["examples"]) <= MAX_EXAMPLES for found in whole.bad.values())


@pytest.mark.parametrize(
    ("records", "bad", "refused"), [(100, 9, False), (999, 10, True), (1000, 10, False), (10, 10, True), (0, 0, False)]
)
def test_more_than_1_percent_and_at_least_10(records: int, bad: int, refused: bool) -> None:
    found = {"bad JSON": {"count": bad, "examples": ["a.jsonl:3: bad JSON: x"]}} if bad else {}
    totals = Totals(counts={"records": records}, bad=found)
    if not refused:
        check_bad_share(totals)
        return
    with pytest.raises(UserError, match=rf"{bad} of {records} records are bad \(bad JSON: {bad}; a\.jsonl:3"):
        check_bad_share(totals)
