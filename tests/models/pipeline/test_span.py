"""Spans: every layer is on one stage, the embedding on the first and the head on the last."""

from hypothesis import given
from hypothesis import strategies as st

from jllm.models.pipeline.span import spans_of


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_spans_cover_every_layer_once(sizes: list[int]) -> None:
    spans = spans_of([sum(sizes[:stage]) for stage in range(len(sizes) + 1)])
    assert [span.num_layers for span in spans] == sizes
    owned = [layer for span in spans for layer in range(span.first_layer, span.end_layer)]
    assert owned == list(range(sum(sizes)))
    assert [span.index for span in spans if span.is_first] == [0]
    assert [span.index for span in spans if span.is_last] == [len(sizes) - 1]
