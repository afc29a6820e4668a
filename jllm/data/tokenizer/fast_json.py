"""JSON of tokenizers, which is tens of MB: orjson, and the standard library for what orjson refuses.

Cost: a fraction of the standard library's time.
"""

import json
from typing import Any

from jllm.guards import notation


def loads(text: str | bytes) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: not JSON.
    """
    import orjson

    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:  # also lone surrogates, which the standard library reads
        return notation.loads(text)


def dumps(value: Any) -> str:
    """As `json.dumps`, without blanks, and without escapes where there is no need of them."""
    import orjson

    try:
        return orjson.dumps(value).decode()
    except TypeError:
        return json.dumps(value)
