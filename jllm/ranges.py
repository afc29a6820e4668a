"""The values that a number given by a user may have; a range stands with its option."""

import dataclasses
import math

LEAST_INT, MOST_INT = -(1 << 63), (1 << 63) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueRange:
    """The values that a number may have; never NaN, nor infinite.

    Attributes:
        least, most: the ends, which belong to it but for those that are left out.
        above_least, below_most: the end itself is left out.
        whole_from_1: below 1 it is a share of something, from 1 on a number of things, and whole.
    """

    least: float = 0
    most: float = MOST_INT
    above_least: bool = False
    below_most: bool = False
    whole_from_1: bool = False

    def mistake(self, name: str, value: float) -> str | None:
        """What is wrong with a value, for people; None where nothing is."""
        given = f"--{name} {value}"
        if not math.isfinite(value):
            return f"{given}: give a finite number, {self}"
        if value < self.least or (self.above_least and value == self.least):
            return f"{given}: {self._lower}"
        if value > self.most or (self.below_most and value == self.most):
            return f"{given}: it must be {self._upper}"
        if self.whole_from_1 and value >= 1 and value != int(value):
            return f"{given}: give a share below 1, or a whole number from 1 on"
        return None

    @property
    def _lower(self) -> str:
        return f"it must be above {self.least:g}" if self.above_least else f"it must be at least {_plain(self.least)}"

    @property
    def _upper(self) -> str:
        return f"{'below' if self.below_most else 'at most'} {_plain(self.most)}"

    def __str__(self) -> str:
        lower = f"{'above' if self.above_least else 'at least'} {_plain(self.least)}"
        return lower if self.most == MOST_INT else f"{lower} and {self._upper}"


def named_number(item: str) -> tuple[str, float] | None:
    """ "name=0.5" as the two; None where no number stands after the last equals sign, or nothing before it."""
    name, _, text = item.rpartition("=")
    try:
        number = float(text)
    except ValueError:
        return None
    return (name, number) if name else None


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
