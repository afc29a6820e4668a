"""Flags that say whether something is trained on, under the names that they have.

Guarantees: a flag is yes, no, or refused by name; no beats yes.
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


def _number(value: Any) -> bool | None:
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
