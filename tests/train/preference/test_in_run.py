"""Evaluations on pairs; what a whole run makes of them is in tests/distributed/test_preference.py."""

import pytest

from jllm.train.evaluate import mean_loss
from jllm.train.objectives.preference import PairSums
from jllm.train.preference.in_run import PairEvaluation


def test_an_evaluation_is_a_mean_over_pairs() -> None:
    one = PairEvaluation(sums=PairSums(pairs=4, loss=2.0, chosen=4.0, rejected=2.0, right=3))
    other = PairEvaluation(sums=PairSums(pairs=1, loss=3.0))
    assert one.loss == 0.5
    found = one.record()
    assert found["eval_loss"] == 0.5
    assert found["eval_pairs"] == 4
    assert found["rewards/margins"] == 0.5
    assert found["rewards/accuracies"] == 0.75
    assert mean_loss([one, other]) == pytest.approx(1.0), "by pairs, not by sets"
