"""What says which tokens are trained on: labels, checked; and the columns with which other programs say it.

A label is the id of its token, or -100 where the token is not trained on. Columns that mean the same under another
name (`completion_mask`, `loss_weights`, ...) are never passed over: where rows are read in place they are refused by
name, and `raw2ids` makes labels of those whose meaning is clear.

Cost: labels are compared once with their ids wherever both are read, under a millisecond for a million tokens.
"""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa

from jllm.data.dataset.columns import COLUMNS, CU_SEQLENS, IGNORE_INDEX, LABELS, from_list_array
from jllm.data.dataset.further import is_list
from jllm.errors import UserError

ATTENTION_MASK = "attention_mask"
_TOKEN = "(_tokens?)?"
_LEARNT = (
    "completions?|assistants?|loss|train|trained|training|trainable|response|responses|answers?|outputs?|targets?|"
    "generations?|generated|labels?|supervised|action|actions"
)
_GIVEN = "prompts?|instructions?|inputs?|users?|system|context|query|question|questions|ignored?"
_CLEAR = re.compile(
    rf"({_LEARNT}){_TOKEN}_masks?|((loss|tokens?|labels?|train|training|target)_)?weights?|loss_scales?"
)
_CLEAR_OF_ROWS = re.compile(r"((loss|train|training|sample|row|example)_)?weight|trained|train|loss")
_UNCLEAR = re.compile(
    rf"({_GIVEN}){_TOKEN}_masks?|masks?|masked|is_(trained|train|masked|prompt|completion|response|answer)|ignore"
)


def _plain(name: str) -> str:
    """A column's name in small letters, its words parted by underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()


def says_what_is_trained(field: pa.Field) -> bool:
    """Whether a column that is neither ids nor labels says which tokens or rows are trained on."""
    return marks_trained(field) or (_flags(field.type) and bool(_UNCLEAR.fullmatch(_plain(field.name))))


def marks_trained(field: pa.Field) -> bool:
    """Whether a column has 1 for each token that is trained on, or for each row, and 0 for the others."""
    name = _plain(field.name)
    if not _flags(field.type):
        return False
    if is_list(field.type):
        return bool(_CLEAR.fullmatch(name))
    if name == "loss" and pa.types.is_floating(field.type):
        return False  # a figure that somebody measured
    return bool(_CLEAR_OF_ROWS.fullmatch(name))


def _flags(kind: pa.DataType) -> bool:
    element = kind.value_type if is_list(kind) else kind
    return bool(pa.types.is_boolean(element) or pa.types.is_integer(element) or pa.types.is_floating(element))


def refuse_other_marks(schema: pa.Schema, path: Path | str, *, padded: bool) -> None:
    """Refuse a file whose rows cannot be read in place, because other columns say what of them is trained on.

    Args:
        schema: the file's own.
        path: the file, for the message.
        padded: its `attention_mask`, where it has one, is 0 somewhere.

    Raises:
        UserError: there is such a column, or padding that nothing else tells apart.
    """
    way_out = "make labels of it with: python -m jllm.raw2ids --input_format ids"
    for field in schema:
        if field.name not in COLUMNS and says_what_is_trained(field):
            raise UserError(
                f"{path}: column {field.name} says what is trained on, which is read from {LABELS} alone; {way_out}, or"
                " leave the column out"
            )
    if padded and LABELS not in schema.names and CU_SEQLENS not in schema.names:
        raise UserError(
            f"{path}: column {ATTENTION_MASK} is 0 where there is padding, which would be trained on; leave the padding"
            " out with: python -m jllm.raw2ids --input_format ids"
        )


def check_labels(
    ids: pa.ListArray, labels: pa.ListArray, path: Path | str, first_row: int, *, of_first: bool = True
) -> None:
    """Refuse labels that are not those of their ids.

    Args:
        ids, labels: rows of the contract.
        path: the file that they are from.
        first_row: the number of the first of them in it.
        of_first: compare also those of the rows' first tokens, which nobody predicts.

    Raises:
        UserError: a row has not as many labels as ids, or a label that is neither its id nor -100.
    """
    values, offsets = from_list_array(ids)
    marked, places = from_list_array(labels)
    if len(marked) != len(values) or not np.array_equal(offsets, places):
        row = int(np.argmax(np.diff(offsets) != np.diff(places)))
        raise UserError(
            f"{path}: row {first_row + row} has {places[row + 1] - places[row]} labels for"
            f" {offsets[row + 1] - offsets[row]} ids; give each id a label, itself or {IGNORE_INDEX}"
        )
    wrong = marked != values
    if not wrong.any():
        return
    wrong &= marked != IGNORE_INDEX
    if not of_first:
        wrong[offsets[:-1][offsets[:-1] < len(wrong)]] = False  # where rows are empty, the next one's
    if wrong.any():
        place = int(np.argmax(wrong))
        row = int(np.searchsorted(offsets, place, side="right")) - 1
        raise UserError(
            f"{path}: row {first_row + row} has the label {marked[place]} for the id {values[place]}; a label is its"
            f" id, or {IGNORE_INDEX} where it is not trained on (labels are not shifted)"
        )
