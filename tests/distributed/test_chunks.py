"""A run whose logits are taken in chunks is the run that takes them whole: losses, evaluations, norms, weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.distributed.ranks import Ranks
from tests.distributed.runs import options_of, records, train_rank
from tests.fixtures import VOCABULARY, random_rows, tiny_llama, write_rows


def train_in_chunks(options: dict[str, Any], tokens: int) -> tuple[str | None, int]:
    """A rank's answer, and how often its head ran, with at most so many tokens in a chunk."""
    from jllm.models.pipeline import head

    head.CHUNK_ELEMENTS = tokens * VOCABULARY
    calls = 0
    plain = head.FamilyHead.__call__

    def counted(self: head.FamilyHead, hidden: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(self, hidden)

    head.FamilyHead.__call__ = counted  # type: ignore[method-assign]
    return train_rank(options), calls


def test_chunks_change_nothing(ranks: Callable[[int], Ranks], tmp_path: Path) -> None:
    """Two stages, tied, activations recomputed."""
    from safetensors.torch import load_file

    tiny_llama(tmp_path / "model", tied=True)
    write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)
    calls = {}
    for tokens in (10_000, 7):
        more = {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
            "max_steps": 12,
            "checkpoint_grad_interval": 1,
            "eval_data": (str(tmp_path / "data"),),
            "output_dir": tmp_path / f"out-{tokens}",
        }
        answers = ranks(2).run(train_in_chunks, options_of(tmp_path, **more), tokens)
        assert [answer for answer, _ in answers] == [None, None]
        assert answers[0][1] == 0  # the first stage has no head
        calls[tokens] = answers[1][1]
    assert calls[7] > 5 * calls[10_000]
    whole, chunked = (tmp_path / f"out-{tokens}" for tokens in (10_000, 7))
    for kind, keys in (("loss", ("loss", "grad_norm")), ("eval_loss", ("eval_loss", "accuracy"))):
        one, other = (records(folder / "log", kind) for folder in (whole, chunked))
        assert len(one) == len(other) > 1
        assert all(one[-1][key] for key in keys)
        for key in keys:
            np.testing.assert_allclose([r[key] for r in other], [r[key] for r in one], rtol=1e-5)
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (whole, chunked)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name].numpy(), tensor.numpy(), atol=1e-5)
