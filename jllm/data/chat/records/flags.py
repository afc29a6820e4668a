"""Flags that say whether something is trained on, under the names that they have.

Guarantees: a flag is yes, no, or refused by name; no beats yes. A fraction is refused; but beside a record, a `loss` of
2.3 is a measurement (`is_measured`). Weights are refused there too: training on all alike is not what they say.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from jllm.data.chat.records.conversation import BadRecordError, shown

_YES = frozenset(
    [
        "train",
        "training",
        "trainable",
        "trained",
        "train_on",
        "train_on_turn",
        "train_on_this",
        "train_mask",
        "learn",
        "learnable",
        "weight",
        "loss",
        "loss_weight",
        "loss_mask",
        "loss_scale",
        "compute_loss",
        "calculate_loss",
        "has_loss",
        "with_loss",
        "supervised",
        "weights",
        "train_weight",
        "training_weight",
        "loss_weights",
    ]
)
_BY_DEFAULT = frozenset(
    ["weight", "weights", "loss_weight", "loss_weights", "loss_scale", "train_weight", "training_weight"]
)
"""Of these 1 is what a field says where nobody thought of it."""
_NO = frozenset(
    [
        "masked",
        "ignore",
        "ignored",
        "ignore_loss",
        "no_loss",
        "no_train",
        "skip_loss",
        "skip_train",
        "mask_loss",
        "untrained",
        "exclude_from_loss",
        "loss_ignored",
        "loss_masked",
        "mask_out",
        "masked_out",
        "do_not_train",
    ]
)
_UNCLEAR = frozenset(("mask", "train_detail", "training_detail"))
_WORDS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False, "1.0": True, "0.0": False}


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    """`isMasked`, `Loss-Weight` and `should_train` as `masked`, `loss_weight` and `train`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).replace("-", "_").lower()
    return re.sub(r"^(is|should|to|do)_(?!not)", "", words)


def is_flag(name: str) -> bool:
    """Whether a field of this name says what is trained on."""
    plain = _plain(name)
    return plain in _YES or plain in _NO or plain in _UNCLEAR


def flag_of(fields: Mapping[str, Any], where: str) -> bool | None:
    """What the flags among these fields say; None where there are none.

    Raises:
        BadRecordError: a flag is neither yes nor no.
    """
    said: bool | None = None
    for name, value in fields.items():
        if value is None or not is_flag(name):
            continue
        plain = _plain(name)
        if plain in _UNCLEAR:
            raise BadRecordError(
                "unclear flag", f"{where} has {shown(name)}, which may mean two things; write train or masked, 0 or 1"
            )
        yes = _WORDS.get(value.strip().lower()) if isinstance(value, str) else _number(value)
        if yes is None:
            raise BadRecordError("wrong type", f"{where} has {shown(name)} {shown(value)}; it must be 0 or 1")
        yes = yes if plain in _YES else not yes
        said = yes if said is None else said and yes
    return said


def asks_for_training(fields: Mapping[str, Any]) -> bool:
    """Whether a flag among these, which say yes, asks for training also on what is trained on by nobody's default, such
    as a question. A weight of 1 and `masked: false` do not: they stand on every message where some are told apart."""
    return any(
        value is not None and (plain := _plain(name)) in _YES and plain not in _BY_DEFAULT
        for name, value in fields.items()
    )


def is_measured(name: str, value: Any) -> bool:
    """Whether a field beside a record is a loss that somebody measured, which is no flag: a number but 0 and 1."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _plain(name) == "loss" and is_number and _number(value) is None


def _number(value: Any) -> bool | None:
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
