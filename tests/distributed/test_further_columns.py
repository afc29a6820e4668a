"""A data set with further columns trains as it does without them."""

from collections.abc import Callable
from pathlib import Path

from tests.data.typed_sets import EVERY_TYPE, make_typed_set
from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import VOCABULARY, tiny_llama


def test_the_losses_are_the_same(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model", tied=False)
    settings = {"gradient_accumulation_steps": 2, "max_steps": 3, "no_shuf": True}
    losses = []
    for name, further in (("plain", ()), ("typed", EVERY_TYPE)):
        data = make_typed_set(tmp_path / name, VOCABULARY, further, files=2)
        options = options_of(tmp_path, settings, train_data=(str(data),), log_dir=tmp_path / f"{name}-log")
        assert ranks(2).run(train_rank, options) == [None, None]
        losses.append([record["loss"] for record in records(tmp_path / f"{name}-log")])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
