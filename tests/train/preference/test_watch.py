"""Warnings of a run on pairs come once, when there is a reason."""

from jllm.train.preference.watch import WINDOW, PairWatch


def said(watch: PairWatch, rewards: list[tuple[float, float]], first: int = 1) -> list[str]:
    found = []
    for step, (chosen, rejected) in enumerate(rewards, first):
        record = {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected}
        found += list(watch.warnings(step, record))
    return found


def test_all_is_well() -> None:
    watch = PairWatch(compares=True, starts=True)
    assert said(watch, [(0.0, 0.0), *((0.01 * k, -0.05 * k) for k in range(100))]) == []
    assert list(watch.warnings(200, {})) == [], "a step that was passed over"


def test_margins_explode() -> None:
    watch = PairWatch(compares=True, starts=False)
    [line] = said(watch, [(1.0, 0.0), (30.0, -31.0), (40.0, -40.0)])
    assert "mean margin is 61" in line


def test_both_fall() -> None:
    falling = [(-0.1 * k, -0.2 * k) for k in range(4 * WINDOW)]
    [line] = said(PairWatch(compares=True, starts=False), falling)
    assert "both fall" in line
    assert not said(PairWatch(compares=False, starts=False), falling), "without a reference rewards are below 0"
    assert not said(PairWatch(compares=True, starts=False), [(-2.0, -3.0)] * 4 * WINDOW)


def test_a_start_that_is_not_the_reference() -> None:
    [line] = said(PairWatch(compares=True, starts=True), [(0.5, -0.1), (0.5, -0.1)])
    assert "the model is still the reference" in line
    assert not said(PairWatch(compares=True, starts=False), [(0.5, -0.1)])
