"""Rows that cannot be trained on, met where they are read: what is wrong, and which row it is."""

from collections.abc import Sequence

import numpy as np

from jllm.data.packing.pair_rows import pairs_of, reference_mismatch
from jllm.errors import UserError
from jllm.train.data.rows import Row


class RowError(UserError):
    """A row that cannot be trained on; `place` is its number in the global batch."""

    def __init__(self, message: str, place: int) -> None:
        super().__init__(message)
        self.place = place


def check_classes(rows: Sequence[Row]) -> None:
    """Raises:
    RowError: a row has not a control class for each token.
    """
    for place, row in enumerate(rows):
        if row.classes is None or len(row.classes) != len(row.ids):
            found = "no control classes" if row.classes is None else f"{len(row.classes)} control classes"
            raise RowError(
                f"a row of {len(row.ids)} tokens has {found}; each token has one: make the shards with raw2ids"
                " --control_class",
                place,
            )
        if len(row.classes) and (row.classes.min() < -1 or row.classes.max() > 1):
            wrong = int(row.classes[np.abs(row.classes) > 1][0])
            raise RowError(f"control class {wrong} in the data; classes are 1, -1 and 0", place)


def checked_pairs(rows: Sequence[Row], *, references: bool) -> list[int]:
    """How many preference pairs each row has.

    Args:
        references: whether they have reference log-probabilities, which must be those of these rows.

    Raises:
        RowError: a row is none of pairs, or its references are of other tokens.
    """
    found = []
    for place, row in enumerate(rows):
        try:
            found.append(pairs_of(row.labels, row.boundaries))
        except ValueError as error:
            raise RowError(
                f"not a row of preference pairs: {error}; make the shards with raw2ids -t preference", place
            ) from None
        assert row.labels is not None
        assert row.boundaries is not None
        if references:
            wrong = reference_mismatch(row.ids, row.labels, row.boundaries, row.references, row.checksum)
            if wrong is not None:
                raise RowError(f"{wrong}; make them again with --write_ref_logps", place)
    return found
