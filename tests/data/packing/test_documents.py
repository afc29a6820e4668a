"""Documents taken out of many, and what is put around each."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jllm.data.packing import documents as documents_
from jllm.data.packing.documents import with_affixes
from tests.data.packed_rows import documents_of

EXAMPLES = 60 * int(os.environ.get("JLLM_TEST_SIZE", "1"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), max_size=12), data=st.data(), labels=st.booleans())
def test_documents_taken_are_those_documents(lengths: list[int], data: st.DataObject, labels: bool) -> None:
    documents = documents_of(lengths, labels=labels)
    chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=12)) if lengths else []
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(lengths))] * 2)))
    for numbers, found in (
        (chosen, documents.take(np.array(chosen, dtype=np.int64))),
        (list(range(start, end)), documents.slice(start, end)),
    ):
        assert len(found) == len(numbers)
        for place_, number in enumerate(numbers):
            a, b = found.offsets[place_ : place_ + 2]
            first, last = documents.offsets[number : number + 2]
            assert found.ids[a:b].tolist() == documents.ids[first:last].tolist()
            if labels:
                assert found.labels is not None
                assert documents.labels is not None
                assert found.labels[a:b].tolist() == documents.labels[first:last].tolist()


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 4), max_size=8),
    prefix=st.lists(st.integers(90, 99), max_size=3),
    suffix=st.lists(st.integers(90, 99), max_size=3),
    long=st.sampled_from([0, documents_.LONG]),
)
def test_affixes_stand_around_each(lengths: list[int], prefix: list[int], suffix: list[int], long: int) -> None:
    documents = documents_of(lengths)
    around = [np.array(ids, dtype=np.int32) for ids in (prefix, suffix)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_, "LONG", long)
        values, offsets = with_affixes(documents.ids, documents.offsets, *around)
    found = [values[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    own = [documents.ids[a:b].tolist() for a, b in itertools.pairwise(documents.offsets)]
    assert found == [[*prefix, *ids, *suffix] for ids in own]
