"""`--schedule overlapped`: bit-identical losses, norms and weights, whatever the stages, the lengths, what is tied."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import Ranks
from tests.distributed.runs import logged_options, records, train_rank
from tests.fixtures import model_and_data


@pytest.mark.parametrize(
    ("stages", "micro_batches", "more"),
    [
        (4, 5, {"precision": "bf16"}),
        # Two pipelines, the embedding tied over both ends of each, an evaluation between the steps.
        (2, 3, {"steps_per_eval": 2, "checkpoint_grad_interval": 1}),
        (2, 1, {"optimizer": "adamw_kahan", "precision": "bf16"}),
    ],
)
def test_the_same_to_the_last_bit(
    ranks: Callable[[int], Ranks], tmp_path: Path, stages: int, micro_batches: int, more: dict[str, object]
) -> None:
    folder = model_and_data(tmp_path, tied=True, rows=96)
    if "steps_per_eval" in more:
        more = more | {"eval_data": (str(folder / "data"),)}
    found = []
    for kind in ("1f1b", "overlapped"):
        options = logged_options(
            folder,
            tmp_path / kind,
            schedule=kind,
            pipe_parallel_size=stages,
            gradient_accumulation_steps=micro_batches,
            max_steps=4,
            output_dir=tmp_path / kind / "model",
            **more,
        )
        assert ranks(4).run(train_rank, options) == [None] * 4
        log = tmp_path / kind / "log"
        numbers = [(each["loss"], each["grad_norm"], each["tokens"]) for each in records(log)]
        assert len({tokens for *_, tokens in numbers}) > 1, "the steps differ in length"
        evaluations = [each["eval_loss"] for each in records(log, "eval_loss")]
        weights = {
            name: tensor
            for path in (tmp_path / kind / "model").glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        found.append((numbers, evaluations, weights))
    (plain, plain_evaluations, plain_weights), (overlapped, evaluations, weights) = found
    assert plain == overlapped
    assert plain_evaluations == evaluations
    assert plain_weights.keys() == weights.keys()
    assert all(torch.equal(plain_weights[name], weights[name]) for name in weights)
