"""What of a model one pipeline stage owns, in numbers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageSpan:
    """What one pipeline stage owns: decoder layers [first_layer, end_layer), and what lies before or after them all.

    Of the first and the last of its layers that may be a half (`jllm.models.pipeline.halves`): the neighbouring stage
    has the other one, and counts that layer among its own, too.
    """

    index: int
    count: int
    first_layer: int
    end_layer: int
    starts_inside: bool = False
    """Whether it has the second half only of its first layer."""
    ends_inside: bool = False
    """Whether it has the first half only of its last layer."""

    @property
    def is_first(self) -> bool:
        """Whether this stage owns the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage owns the final norm and the head."""
        return self.index == self.count - 1

    @property
    def num_layers(self) -> float:
        """How many decoder layers this stage owns."""
        return self.end_layer - self.first_layer - (self.starts_inside + self.ends_inside) / 2


def spans_of(boundaries: Sequence[int], *, in_halves: bool = False) -> list[StageSpan]:
    """The stages between `boundaries`: [0, 8, 17, 26] gives three. These count layers, or half layers."""
    count, units = len(boundaries) - 1, 2 if in_halves else 1
    return [
        StageSpan(
            index=index,
            count=count,
            first_layer=boundaries[index] // units,
            end_layer=-(-boundaries[index + 1] // units),
            starts_inside=bool(boundaries[index] % units),
            ends_inside=bool(boundaries[index + 1] % units),
        )
        for index in range(count)
    ]
