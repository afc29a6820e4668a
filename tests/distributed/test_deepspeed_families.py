"""Families through DeepSpeed's pipeline engine: two real stages train as one plain transformers process does."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.ranks import Ranks
from tests.distributed.reference import batches_in_order, train_reference
from tests.distributed.runs import SHORT, options_of, records, train_rank
from tests.fixtures import VOCABULARY, random_rows, write_rows
from tests.models.family_check import make_folder
from tests.models.tiny import tiny_config

STEPS = 3


@pytest.mark.parametrize("family", ["gemma2", "granite", "mixtral", "qwen3"])
def test_family_through_deepspeed(ranks: Callable[[int], Ranks], tmp_path: Path, family: str) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = tmp_path / "model"
    make_folder(tiny_config(family, tied=family in ("gemma2", "qwen3"), vocab_size=VOCABULARY), model)
    data = write_rows(tmp_path / "data", random_rows(12, labels=True, packed=True), files=2)
    options = {"optimizer": "sgd", "learning_rate": 0.02, "gradient_clipping": 0.7, "seed": 7}
    more = {"max_steps": STEPS, "output_dir": tmp_path / "out", "partition_method": "uniform"}
    assert ranks(2).run(train_rank, options_of(tmp_path, {**options, **SHORT}, **more)) == [None] * 2
    losses, norms, weights = train_reference(
        model, batches_in_order(data, steps=STEPS, global_batch=4, seed=options["seed"]), options=options
    )
    found = records(tmp_path / "out/log")
    np.testing.assert_allclose([record["loss"] for record in found], losses, atol=1e-5)
    np.testing.assert_allclose([record["grad_norm"] for record in found], norms, rtol=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0)
    published = {name for path in model.glob("*.safetensors") for name in load_file(path)}
    assert {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)} == published
