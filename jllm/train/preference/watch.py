"""Warnings of a run on preference pairs: margins that explode, rewards that both fall, a start that is not at 0.

Cost: some numbers of the last steps.
"""

from collections import deque
from collections.abc import Iterator, Mapping

MOST_MARGIN = 50.0
"""A mean margin above this is no preference any more: log s(50) is 0 to the last digit."""
WINDOW = 20
"""So many steps are compared with as many before them."""
MOST_AT_START = 0.1
"""The mean reward that a side may have at the first step, by rounding alone."""


class PairWatch:
    """Looks at the rewards of each step. Each warning is given once.

    Args:
        compares: rewards are compared with a reference, so that they are 0 before training.
        starts: the run starts from the reference.
    """

    def __init__(self, *, compares: bool, starts: bool) -> None:
        self._compares, self._starts = compares, starts
        self._last: deque[tuple[float, float]] = deque(maxlen=2 * WINDOW)
        self._said: set[str] = set()

    def warnings(self, step: int, record: Mapping[str, float]) -> Iterator[str]:
        """What is odd about this step, whose record has the rewards of pairs; nothing where it has none."""
        if "rewards/margins" not in record:
            return
        chosen, rejected = record["rewards/chosen"], record["rewards/rejected"]
        self._last.append((chosen, rejected))
        if self._starts and step == 1 and max(abs(chosen), abs(rejected)) > MOST_AT_START:
            yield from self._once(
                "start",
                f"the rewards of the first step are {chosen:.3g} and {rejected:.3g}, and the model is still the"
                " reference: dropout or noise is on, or the reference was made in another way",
            )
        if abs(record["rewards/margins"]) > MOST_MARGIN:
            yield from self._once(
                "margin",
                f"the mean margin is {record['rewards/margins']:.3g}: the pairs are learned by heart; lower"
                " --learning_rate or the number of epochs, or raise --beta",
            )
        if self._both_fall():
            yield from self._once(
                "fall",
                f"the rewards of chosen and of rejected answers both fall, to {chosen:.3g} and {rejected:.3g}: the"
                " model unlearns the chosen answers too; lower --learning_rate, or add --pref_ftx",
            )

    def _both_fall(self) -> bool:
        if not self._compares or len(self._last) < 2 * WINDOW:
            return False
        before, after = list(self._last)[:WINDOW], list(self._last)[WINDOW:]
        means = [[sum(each[side] for each in part) / WINDOW for part in (before, after)] for side in (0, 1)]
        return all(late < early and late < 0 for early, late in means) and means[0][1] < -1

    def _once(self, name: str, line: str) -> Iterator[str]:
        if name not in self._said:
            self._said.add(name)
            yield line
