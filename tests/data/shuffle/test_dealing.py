"""Files are dealt to partitions of like size, and where they are like anyway, to the ones that always had them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from jllm.data.shuffle.dealing import EVEN, deal

SETS = st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=9), min_size=1, max_size=4)


def files_of(sets: list[list[int]]) -> tuple[list[tuple[str, int]], list[int]]:
    files = [(f"set{number}", index) for number, sizes in enumerate(sets) for index in range(len(sizes))]
    return files, list(itertools.chain(*sets))


def spread(loads: list[int]) -> float:
    return (max(loads) - min(loads)) * len(loads) / max(1, sum(loads))


@given(sets=SETS, partitions=st.integers(1, 6))
def test_dealing(sets: list[list[int]], partitions: int) -> None:
    files, tokens = files_of(sets)
    dealing = deal(files, tokens, partitions)
    assert sorted(itertools.chain(*dealing.parts)) == list(range(len(files))), "each file once"
    plain = [sum(tokens[at] for at, (_, k) in enumerate(files) if k % partitions == part) for part in range(partitions)]
    loads = [sum(tokens[at] for at in part) for part in dealing.parts]
    assert spread(loads) <= spread(plain) + 1e-9, "never worse than block k, k+n, ..."
    if spread(plain) <= EVEN:
        assert all(files[at][1] % partitions == part for part, own in enumerate(dealing.parts) for at in own)
    for number, sizes in enumerate(sets):  # a set goes to all partitions alike
        counts = [sum(files[at][0] == f"set{number}" for at in part) for part in dealing.parts]
        assert max(counts) - min(counts) <= 1, sizes
    assert (dealing.note is not None) == (spread(loads) > EVEN)
    if dealing.note is not None:
        assert f"from {min(loads):,} to {max(loads):,} tokens" in dealing.note


@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=5), partitions=st.integers(1, 6))
def test_equal_files_are_dealt_as_evenly_as_can_be(counts: list[int], partitions: int) -> None:
    files, tokens = files_of([[100] * count for count in counts])
    loads = [sum(tokens[at] for at in part) for part in deal(files, tokens, partitions).parts]
    assert max(loads) - min(loads) <= 100


def test_unknown_tokens() -> None:
    dealing = deal([("a", 0), ("a", 1), ("b", 0)], [1, None, 3], 2)
    assert dealing.parts == ((0, 2), (1,))
    assert dealing.note is not None
    assert "not known" in dealing.note
