"""Records as numbers with names, which is what TensorBoard and services know."""

from typing import Any

from jllm.train.records.metrics_file import EVENT, is_evaluation, is_event

_PLACES = ("step", "name", "time")
"""Fields that say where a number belongs, and are none of their own."""


def flat_numbers(record: dict[str, Any]) -> dict[str, float]:
    """Every number of a record by its name: `train/loss`, `train/memory_mib/0`, `eval/web/loss`, `event/end/exit_code`.

    NaN and infinity are numbers; what is null, text or a truth value is not.
    """
    if is_event(record):
        prefix = f"event/{record[EVENT]}"
    else:
        prefix = f"eval/{record['name']}" if is_evaluation(record) else "train"
    found: dict[str, float] = {}
    for key, value in record.items():
        if key in _PLACES:
            continue
        name = f"{prefix}/{key.removeprefix('eval_')}"
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for number, item in items:
            if isinstance(item, int | float) and not isinstance(item, bool):
                found[name if number is None else f"{name}/{number}"] = float(item)
    return found
