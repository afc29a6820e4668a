"""What of a model one pipeline stage owns, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """What one pipeline stage owns: decoder layers [first_layer, end_layer), and what lies before or after them all."""

    index: int
    count: int
    first_layer: int
    end_layer: int

    @property
    def is_first(self) -> bool:
        """Whether this stage owns the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage owns the final norm and the head."""
        return self.index == self.count - 1

    @property
    def num_layers(self) -> int:
        """How many decoder layers this stage owns."""
        return self.end_layer - self.first_layer


def spans_of(boundaries: Sequence[int]) -> list[StageSpan]:
    """The stages between `boundaries`: [0, 8, 17, 26] gives three."""
    count = len(boundaries) - 1
    return [
        StageSpan(index=index, count=count, first_layer=boundaries[index], end_layer=boundaries[index + 1])
        for index in range(count)
    ]
