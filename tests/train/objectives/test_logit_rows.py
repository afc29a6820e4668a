"""Rows that compiled functions work on, as on GPUs: two graphs for any number of tokens, and the same numbers."""

import logging
from typing import Any

import pytest
import torch

from jllm.train.objectives import fused, logit_rows
from jllm.train.options.objective import LOSSES
from tests.train.objectives.product_heads import HEADS, ProductHead, assert_equal, micro_batch, results

torch.set_num_threads(1)


@pytest.mark.parametrize("chunk", [64, 200], indirect=True)
@pytest.mark.parametrize("more", [HEADS[0], HEADS[4]], ids=str)
@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_rows(kind: str, more: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on GPUs: one graph for all numbers of tokens, on a buffer whose rows are wider than the vocabulary."""
    monkeypatch.setattr(logit_rows, "compiles", lambda device: True)
    monkeypatch.setattr(fused, "compiles", lambda device: True)
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    logit_rows._compiled.cache_clear()
    torch._dynamo.reset()
    plain_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda of, **options: plain_compile(of, backend=backend, **options))
    head = ProductHead(50, 8, **more)
    try:
        for length in (5, 64, 150):
            hidden, fields = micro_batch(head, (2, length))
            expected = results(head, hidden, fields, is_fused=False, kind=kind)
            assert_equal(results(head, hidden, fields, is_fused=True, kind=kind), expected)
    finally:
        logit_rows._compiled.cache_clear()
        torch._dynamo.reset()
    assert len(graphs) == 2


def test_what_cannot_be_compiled_runs_nonetheless(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._dynamo.exc import TorchDynamoException

    def fails(*arguments: Any) -> Any:
        raise TorchDynamoException("no compiler here")

    monkeypatch.setattr(logit_rows, "_failed", [])
    monkeypatch.setattr(logit_rows, "compiles", lambda device: not logit_rows._failed)
    monkeypatch.setattr(logit_rows, "_compiled", lambda of: (of.statistics, fails))
    head = ProductHead(50, 8)
    hidden, fields = micro_batch(head)
    expected = results(head, hidden, fields, is_fused=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_equal(results(head, hidden, fields, is_fused=True), expected)
    assert [record.getMessage() for record in caplog.records] == [
        "the loss runs uncompiled, which is slower: no compiler here"
    ]
