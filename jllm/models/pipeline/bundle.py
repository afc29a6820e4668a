"""What crosses a stage boundary: one float tensor first, then named integer planes.

A plane is a number for each token of the micro-batch: a label, a position, an id. Which planes there are, and in which
order, is known on every stage before anything is sent, so that two tensors are all that travels. A stage reads planes
by name; one that adds a plane puts it last.

Costs: planes are views of the stack; adding one copies the stack once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LABELS = "labels"
"""The id that follows each token, or the contract's mark where it is not trained on."""
POSITION_IDS = "position_ids"
"""Each token's place in its row, or in its document where documents are kept apart."""
INPUT_IDS = "input_ids"
"""The token itself; only where layers look at it."""
CONTROL_CLASS = "control_class"
"""The class of the token that follows each token, 0 where that is not trained on; only with control adapters."""
DOCUMENTS = "documents"
"""The number of each token's document in the micro-batch, and what is known of the document beside it; only with
preference pairs (`jllm.train.objectives.preference`)."""

READ = (LABELS, POSITION_IDS)
"""The planes of a micro-batch as it is read, beside its input ids."""


@dataclass(frozen=True, eq=False)
class Planes(Mapping[str, Tensor]):
    """Integer planes [B, S] by name.

    Attributes:
        names: of the planes, in the order of the stack.
        stacked: [k, B, S] int64.
    """

    names: tuple[str, ...]
    stacked: Tensor

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.stacked[self.names.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def with_plane(self, name: str, plane: Tensor) -> "Planes":
        """These and one more, [B, S]."""
        assert name not in self.names, name
        return Planes((*self.names, name), torch.cat([self.stacked, plane[None]]))


@dataclass(frozen=True, eq=False)
class Bundle:
    """What one stage hands to the next.

    Attributes:
        hidden: the hidden states, [B, S, width] in most families; for the first stage the input ids [B, S].
        planes: of the micro-batch.
    """

    hidden: Tensor
    planes: Planes

    @classmethod
    def received(cls, sent: tuple[Tensor, Tensor], names: tuple[str, ...]) -> "Bundle":
        """The inverse of `sent`."""
        hidden, stacked = sent
        return cls(hidden, Planes(names, stacked))

    @property
    def sent(self) -> tuple[Tensor, Tensor]:
        """What travels: the float tensor first, as DeepSpeed's buffers need it."""
        return self.hidden, self.planes.stacked
