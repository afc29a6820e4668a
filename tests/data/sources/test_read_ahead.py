"""Reading ahead: the order is that of the sources, and nothing waits that need not."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jllm.data.prepare import recipes
from jllm.data.prepare.config import Raw2IdsConfig
from jllm.data.prepare.encoding import Encoded, PretrainEncoder
from jllm.data.prepare.run import prepare
from jllm.data.sources.read_ahead import ITEMS, SOURCES, in_order
from jllm.errors import UserError
from tests.data.raw2ids_runs import documents, reference_stream, rows_of


def test_items_come_in_the_order_of_the_sources() -> None:
    sources = [lambda number=number: iter([(number, i) for i in range(number % 4)]) for number in range(20)]
    wanted = [(number, (number, i)) for number in range(20) for i in range(number % 4)]
    assert list(in_order(sources)) == wanted
    assert list(in_order(sources, here=range(20))) == wanted
    assert list(in_order([])) == []


def test_the_next_sources_are_read_meanwhile_but_not_too_far() -> None:
    read: list[int] = []
    began = threading.Semaphore(0)

    def source(number: int) -> Iterator[int]:
        for item in range(10):
            read.append(number)
            began.release()
            yield item

    items = in_order([lambda number=number: source(number) for number in range(10)])
    next(items)
    # One item was taken; `ITEMS` of each source are read and wait.
    for _ in range((1 + SOURCES) * ITEMS + 1):
        assert began.acquire(timeout=30), "a source is not read ahead"
    time.sleep(0.1)
    assert sorted(read) == sorted([0, *list(range(1 + SOURCES)) * ITEMS])
    items.close()


def test_an_error_has_its_turn() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise UserError("broken")

    items = in_order([lambda: iter([0, 0, 0, 0]), broken, lambda: iter([2])])
    assert [next(items) for _ in range(5)] == [(0, 0)] * 4 + [(1, 1)]
    with pytest.raises(UserError, match="broken"):
        next(items)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_small_files_are_encoded_at_the_same_time(
    tmp_path: Path, byte_tokenizer: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = documents(8)
    (tmp_path / "in").mkdir()
    for number, text in enumerate(texts):
        record = {"text": text}
        (tmp_path / "in" / f"{number}.{kind}").write_text(json.dumps([record] if kind == "json" else record))
    together = threading.Barrier(2, timeout=120)
    calls = itertools.count()

    class Slow(PretrainEncoder):
        def __call__(self, *arguments: Any) -> Encoded:
            if next(calls) < 2:  # later ones may wait behind one another, for one worker
                together.wait()
            return super().__call__(*arguments)

    monkeypatch.setattr(recipes, "PretrainEncoder", Slow)
    config = Raw2IdsConfig(
        input=(str(tmp_path / "in"),), tokenizer=str(byte_tokenizer), type="pretrain", cores=2, quiet=True,
        output=tmp_path / "out", threads=True,
    )  # fmt: skip
    prepare(config)
    assert rows_of(tmp_path / "out") == reference_stream(byte_tokenizer, texts)


def test_a_damaged_file_comes_after_what_is_before_it(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps({"text": "good"}) + "\n")
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(b"no gzip")
    config = Raw2IdsConfig(
        input=(str(tmp_path / "in"),), tokenizer=str(byte_tokenizer), type="pretrain", quiet=True,
        output=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"b\.jsonl\.gz: cannot be read"):
        prepare(config)
    assert [path.name for path in (tmp_path / "out" / ".raw2ids").glob("block-*")] == ["block-00000-0000000"]
