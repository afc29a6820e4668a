"""The daemon of Spark's Python workers, with a fast engine that is wrong about texts with `LIE` in them.

It is right in its proof, and wrong in the middle of a job: what no tokenizer at hand does by itself.
"""

from typing import Any

from jllm.data.tokenizer.engines import FastEngine

LIE = " ~lie~"


def lie(encode: Any) -> Any:
    """The method `FastEngine.encode`, made wrong."""

    def lying(self: FastEngine, texts: list[str], *, parse_special: bool = False) -> Any:
        ids, offsets = encode(self, texts, parse_special=parse_special)
        return (ids ^ 1 if any(LIE in text for text in texts) else ids), offsets

    return lying


if __name__ == "__main__":
    from pyspark.daemon import manager

    FastEngine.encode = lie(FastEngine.encode)  # type: ignore[method-assign]
    manager()
