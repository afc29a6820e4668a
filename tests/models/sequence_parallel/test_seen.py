"""Queries of a run over the keys before them: plain masked attention, forward and every gradient."""

import functools
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jllm.models.kernels import available as kernels
from jllm.models.sequence_parallel import seen
from jllm.models.sequence_parallel.seen import DocumentRuns, Scores, Seen, attend, takes_runs
from tests.models.sequence_parallel.plain import plain_attention, random_heads, random_positions


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (6, 1)]),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    window=st.none() | st.integers(1, 9),
    softcap=st.none() | st.just(1.5),
    has_sinks=st.booleans(),
    elements=st.sampled_from([1, 40, 2**24]),
    seed=st.integers(0, 2**31),
)
def test_runs_see_what_whole_rows_see(
    batch: int,
    length: int,
    heads: tuple[int, int],
    cuts: list[float],
    share: float,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    elements: int,
    seed: int,
) -> None:
    """However a row is cut into runs, and a run's queries into blocks."""
    generator = torch.Generator().manual_seed(seed)
    case = {"batch": batch, "length": length, "queries": heads[0], "keys": heads[1]}
    inputs = [each.requires_grad_() for each in random_heads(case, generator)]
    query, key, value, sinks = inputs
    positions = random_positions(generator, batch, length, share)
    scores = {"scaling": 0.7, "window": window, "softcap": softcap, "sinks": sinks if has_sinks else None}
    expected = plain_attention(query, key, value, positions, **scores)  # type: ignore[arg-type]
    bounds = sorted({0, length, *(int(cut * length) for cut in cuts)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "BLOCK_ELEMENTS", elements)
        found = torch.cat(
            [
                attend(
                    query[:, :, start:end],
                    key[:, :, :end],
                    value[:, :, :end],
                    Seen.of(positions, start, end),
                    Scores(**scores),  # type: ignore[arg-type]
                )
                for start, end in itertools.pairwise(bounds)
            ],
            2,
        )
        weights = torch.randn(expected.shape, generator=generator).double()
        used = inputs if has_sinks else inputs[:3]
        gradients = torch.autograd.grad((found * weights).sum(), used)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for gradient, plain in zip(gradients, torch.autograd.grad((expected * weights).sum(), used), strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-7, atol=1e-9)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    place=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.2, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_documents_of_a_run(batch: int, length: int, place: float, share: float, seed: int) -> None:
    """Of each row the documents that its queries are of, with the keys up to the last of these queries."""
    positions = random_positions(torch.Generator().manual_seed(seed), batch, length, share)
    start = min(int(place * length), length - 1)
    runs = DocumentRuns.of(Seen.of(positions, start, length).first, start)
    queries, keys = [0], [0]
    for row, low in zip(positions.tolist(), runs.low, strict=True):
        assert low == start - row[start]
        firsts = [at - position for at, position in enumerate(row)][start:]
        for first in dict.fromkeys(firsts):
            queries.append(queries[-1] + firsts.count(first))
            keys.append(keys[-1] + row[max(at for at in range(start, length) if at - row[at] == first)] + 1)
    assert runs.queries.tolist() == queries
    assert runs.keys.tolist() == keys
    assert runs.most_queries == max(runs.queries.diff().tolist())
    assert runs.most_keys == max(runs.keys.diff().tolist())
    assert runs.keys[-1] == sum(length - low for low in runs.low)


def varlen_by_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    most: int,
    most_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
    starts_early: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen` on CPU, whose last query of a document sees its last key, or `starts_early`: whose
    first query sees its first key."""
    found = []
    for (start, end), (first, last) in zip(
        itertools.pairwise(bounds.tolist()), itertools.pairwise(key_bounds.tolist()), strict=True
    ):
        assert end - start <= most
        assert last - first <= most_keys
        q, k, v = (each.transpose(0, 1) for each in (query[start:end], key[first:last], value[first:last]))
        groups = q.shape[0] // k.shape[0]
        assert enable_gqa or groups == 1
        offset = 0 if starts_early else (last - first) - (end - start)
        distance = torch.arange(end - start)[:, None] + offset - torch.arange(last - first)
        mask = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        k, v = (each.repeat_interleave(groups, 0) for each in (k, v))
        scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(found)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    heads=st.sampled_from([(4, 2), (3, 3)]),
    place=st.floats(0, 1),
    share=st.sampled_from([0.0, 0.2, 0.7]),
    window=st.none() | st.integers(1, 9),
    seed=st.integers(0, 2**31),
)
def test_by_lengths_is_what_masks_show(
    batch: int, length: int, heads: tuple[int, int], place: float, share: float, window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    case = {"batch": batch, "length": length, "queries": heads[0], "keys": heads[1]}
    query, key, value, _ = random_heads(case, generator)
    positions = random_positions(generator, batch, length, share)
    start = min(int(place * length), length - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "BY_LENGTHS_ON", ("cpu",))
        patch.setattr(kernels, "_VARLEN_TAKES", frozenset({"window_size", "enable_gqa"}))
        patch.setattr(kernels, "varlen_attn", varlen_by_documents)
        # Kernels take values as wide as keys, which narrower ones are filled up to.
        value = value[..., :3]
        scores, found = Scores(scaling=0.7, window=window), []
        for by_lengths in (True, False):
            visible = Seen.of(positions, start, length, by_lengths=by_lengths)
            assert (visible.runs is not None) == by_lengths
            found.append(attend(query[:, :, start:], key, value, visible, scores))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_kernel_is_tried_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first query of a document sees its first key, masks are taken; and in fp32, for which there is none."""
    takes_runs.cache_clear()
    assert not takes_runs("cpu", torch.bfloat16)
    monkeypatch.setattr(kernels, "BY_LENGTHS_ON", ("cpu",))
    monkeypatch.setattr(kernels, "_VARLEN_TAKES", frozenset({"window_size", "enable_gqa"}))
    monkeypatch.setattr(kernels, "HAS_VARLEN", True)
    for starts_early in (False, True):
        takes_runs.cache_clear()
        varlen = functools.partial(varlen_by_documents, starts_early=starts_early)
        monkeypatch.setattr(kernels, "varlen_attn", varlen)
        assert takes_runs("cpu", torch.bfloat16) != starts_early
        assert not takes_runs("cpu", torch.float32)
    takes_runs.cache_clear()
